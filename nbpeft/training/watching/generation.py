"""Batched generation: encodes prompts, and decodes tokens to text as they are generated."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nbpeft._util.conversations import system_text
from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.errors import AdapterError, in_one_line, shown
from nbpeft.state import Answer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nbpeft.model import PeftModel

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation: ``[{"role": "user", "content": "…"}]``."""

Conversation = tuple[Mapping[str, Any], ...]
"""The messages of a conversation, as chat templates take them."""

INTERVAL = 0.12
"""The shortest time between two reports of the text so far, in seconds."""


@dataclass(frozen=True)
class PromptBatch:
    """Tokenized prompts.

    Attributes:
        prompts: the texts of the prompts; of a conversation the last message.
        token_ids: the token ids of each prompt.
        tokenizer: the tokenizer.
        pad: the id of the padding token.
        ends: ids of tokens that end an answer.
        form: whether the chat template was applied, as text; empty if the tokenizer has none.
        chat: whether the chat template was applied.
        conversations: the messages of each prompt, if the chat template was applied; else empty.
    """

    prompts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    tokenizer: Any = field(repr=False)
    pad: int
    ends: frozenset[int]
    form: str = ""
    chat: bool = False
    conversations: tuple[Conversation, ...] = ()

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        base: Any,
        *,
        chat: bool | None = None,
        system: str = "",
        template: Mapping[str, Any] | None = None,
    ) -> PromptBatch:
        """Tokenize prompts.

        Args:
            prompts: texts or conversations.
            tokenizer: the tokenizer of the model.
            base: the model that answers.
            chat: whether to apply the tokenizer's chat template to texts; None: if it has one.
            system: system prompt of the prompts to which the template is applied; conversations that have one keep it.
            template: variables for the template.

        Raises:
            AdapterError: a prompt is empty, the tokenizer has no chat template but needs one, it refuses a
                conversation, or it does not belong to the model.
        """
        if not prompts:
            raise AdapterError("no prompt given")
        templated = bool(getattr(tokenizer, "chat_template", None))
        if not templated and (chat or any(not isinstance(prompt, str) for prompt in prompts)):
            raise AdapterError("the tokenizer has no chat template: write prompts as plain text")
        chat = templated if chat is None else chat
        conversations = [_messages(prompt, system) if chat or not isinstance(prompt, str) else () for prompt in prompts]
        rows = [
            _rendered(messages, tokenizer, template or {}) if messages else _tokens(str(prompt), tokenizer)
            for prompt, messages in zip(prompts, conversations, strict=True)
        ]
        table = base.get_input_embeddings()
        if table is not None and (largest := max(map(max, rows))) >= table.weight.shape[0]:
            raise AdapterError(
                f"the tokenizer does not belong to this model: token {largest} of "
                f"{table.weight.shape[0]} in the model's vocabulary"
            )
        applied = chat or not isinstance(prompts[0], str)  # without a template, both are errors above
        form = f"chat template {'applied' if applied else 'not applied'}" if templated else ""
        batch = cls.of_tokens(rows, tokenizer, base)
        turns = tuple(conversations) if applied else ()
        return replace(batch, prompts=tuple(map(_words, prompts)), form=form, chat=applied, conversations=turns)

    @classmethod
    def of_tokens(cls, token_ids: Sequence[Sequence[int]], tokenizer: Any, base: Any) -> PromptBatch:
        """A batch of prompts that are tokenized already."""
        ends = _end_tokens(base, tokenizer)
        pad = getattr(tokenizer, "pad_token_id", None)
        pad = pad if pad is not None else min(ends, default=0)
        return cls(("",) * len(token_ids), tuple(map(tuple, token_ids)), tokenizer, pad, ends)

    @property
    def system(self) -> str:
        """The system prompt of the first prompt; empty if it has none."""
        return system_text(self.conversations[0][0]) if self.conversations else ""

    @classmethod
    def joined(cls, batches: Sequence[PromptBatch]) -> PromptBatch:
        """All prompts of several batches for the same model as one batch, in their order."""
        prompts = tuple(prompt for batch in batches for prompt in batch.prompts)
        token_ids = tuple(ids for batch in batches for ids in batch.token_ids)
        return replace(batches[0], prompts=prompts, token_ids=token_ids)

    def inputs(self, device: Any, *, left: bool = True) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, int64 of shape (prompts, longest).

        Args:
            device: the device of the tensors.
            left: whether to pad on the left, so that the answers follow the prompts; an encoder is padded on the right.
        """
        import torch

        longest = max(map(len, self.token_ids))
        fill = [longest - len(row) for row in self.token_ids]
        rows = [_padded(row, [self.pad] * count, left) for row, count in zip(self.token_ids, fill, strict=True)]
        mask = [_padded([1] * len(row), [0] * count, left) for row, count in zip(self.token_ids, fill, strict=True)]
        both = (torch.tensor(values, dtype=torch.long, device=device) for values in (rows, mask))
        return dict(zip(("input_ids", "attention_mask"), both, strict=True))

    def answer(self, tokens: Sequence[int], limit: int) -> Answer:
        """Decode tokens to an answer, without special tokens.

        Args:
            tokens: generated token ids; the answer ends at the first end token.
            limit: the greatest number of tokens, with which an answer without an end token counts as cut.
        """
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        answer_tokens = list(tokens if end is None else tokens[:end])
        text = self.tokenizer.decode(answer_tokens, skip_special_tokens=True)
        return Answer(
            whole_characters(text).strip(),
            len(answer_tokens),
            ended=end is not None,
            cut=end is None and len(answer_tokens) >= limit,
        )


def whole_characters(text: str) -> str:
    """Text of generated tokens without an incomplete character at its end.

    A character whose bytes are split over two tokens decodes to a replacement character until both are there.
    """
    return text.rstrip("\ufffd")


@dataclass(frozen=True)
class GenerationRequest:
    """The settings of one generation.

    Attributes:
        rows: the adapter for each prompt, ``"__base__"`` for none; None: the active adapters.
        max_new_tokens: the limit of an answer, in tokens.
        options: further arguments of ``generate``.
        report: called with the answers so far, one for each row.
        should_stop: called after each token; the generation ends if it returns True.

    Raises:
        AdapterError: ``max_new_tokens`` is not a number of at least 1.
    """

    rows: Sequence[str] | None
    max_new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[list[Answer]], object] | None = None
    should_stop: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise AdapterError(f"max_new_tokens must be at least 1, not {self.max_new_tokens!r}")


class _StopAnswering(Exception):
    """Raised in the streamer to end ``generate``."""


class _Stream:
    """A streamer of transformers that collects the tokens of all rows."""

    def __init__(self, batch: PromptBatch, request: GenerationRequest, rows: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self._batch, self._request = batch, request
        self._prompt_seen = False
        self._reported = time.monotonic()

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in zip(self.tokens, value.reshape(-1).tolist(), strict=True):
            row.append(token)
        if self._request.should_stop is not None and self._request.should_stop():
            raise _StopAnswering
        now = time.monotonic()
        if self._request.report is not None and now - self._reported >= INTERVAL:
            self._reported = now
            self._request.report(self.answers())

    def end(self) -> None:
        """Nothing to do: the final answers come from the result of ``generate``."""

    def answers(self) -> list[Answer]:
        return [self._batch.answer(row, self._request.max_new_tokens) for row in self.tokens]


def generate_batch(model: PeftModel, batch: PromptBatch, request: GenerationRequest) -> tuple[list[Answer], bool]:
    """Answer a batch of prompts in one generation.

    Returns:
        One answer for each prompt, and whether the generation was completed: neither ``should_stop`` nor an
        interrupt ended it early.

    Raises:
        AdapterError: the model cannot generate text, or does not accept these options.
    """
    tokens, complete = generate_tokens(model, batch, request)
    return [batch.answer(row, request.max_new_tokens) for row in tokens], complete


def generate_tokens(model: Any, batch: PromptBatch, request: GenerationRequest) -> tuple[list[list[int]], bool]:
    """Generate the tokens of the answers to a batch of prompts.

    Returns:
        The new tokens of each row, with what follows its end token; and whether the generation was completed, as for
        ``generate_batch``.

    Raises:
        AdapterError: the model cannot generate text, has no data, or does not accept these options.
    """
    from nbpeft.engine.tree.model_tree import check_has_data, manager_of
    from nbpeft.model.handle.serving import serving_rows

    manager = manager_of(model)
    base: Any = model if manager is None else manager.model
    if not hasattr(base, "generate"):
        raise AdapterError(
            f"a {type(base).__name__} cannot answer prompts: it has no generate() "
            "(session.score(data=…) scores a classifier)"
        )
    check_has_data(base)
    two_halves = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    inputs, names = batch.inputs(_input_device(base), left=not two_halves), request.rows
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": request.max_new_tokens, **request.options}
    options.setdefault("pad_token_id", batch.pad)
    if batch.ends:
        options.setdefault("eos_token_id", sorted(batch.ends))
    stream = _Stream(batch, request, len(batch.prompts))
    if options.get("num_beams", 1) == 1:
        options["streamer"] = stream
    # Adapters named in a request answer even while all adapters are disabled.
    rows = (
        nullcontext()
        if names is None or manager is None
        else serving_rows(manager, names, (), inputs, disabled_too=True)
    )
    try:
        with rows:
            tokens = model.generate(**inputs, **options)
    except (_StopAnswering, KeyboardInterrupt):
        return stream.tokens, False
    except ValueError as error:
        if not request.options or _raised_in_forward(error):
            raise
        reason = in_one_line(error)
        raise AdapterError(f"generate does not accept {', '.join(request.options)}: {reason:.200}") from error
    # A decoder of its own starts with one token, and not with the prompt.
    generated: list[list[int]] = tokens[:, 1 if two_halves else inputs["input_ids"].shape[1] :].tolist()
    return generated, True


def _raised_in_forward(error: BaseException) -> bool:
    """Whether the model itself raised an error, and not ``generate`` because of its options."""
    return any(frame.f_code.co_name == "forward" for frame, _ in traceback.walk_tb(error.__traceback__))


def _input_device(base: Any) -> Any:
    """The device of the input embeddings; if they are offloaded, the device they are moved to for each call."""
    from nbpeft.engine.contract.base import offloading

    embeddings = base.get_input_embeddings()
    hook = offloading(getattr(embeddings, "base_layer", embeddings))
    return embeddings.weight.device if hook is None else hook.execution_device


def check_finite(model: PeftModel, name: str, batch: PromptBatch) -> None:
    """Check that an adapter's weights, and the logits on the prompts, are finite.

    Raises:
        AdapterError: a weight or a logit is not finite.
    """
    import torch

    # Fused attention kernels turn NaN queries into zeros: finite logits alone prove nothing.
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.manager.parameters(name)):
        raise AdapterError("its weights are not finite")
    base: Any = model.manager.model
    logits = torch.no_grad()(model.__call__)(**batch.inputs(_input_device(base))).logits
    if not bool(torch.isfinite(logits[:, -1]).all()):
        raise AdapterError("its output on the prompt is not finite")


def continued(conversation: Conversation, prompt: Prompt) -> Prompt:
    """A prompt with the earlier messages of a conversation before it; without earlier messages, the prompt itself."""
    if not conversation:
        return prompt
    return [*conversation, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)]


def answered(conversation: Conversation, answer: str) -> Conversation:
    """A conversation with the answer to its last message."""
    return (*conversation, {"role": "assistant", "content": answer})


def waits(model: PeftModel) -> bool:
    """Whether this thread has to wait for the current step of a training in the background."""
    gate = model.manager.active_state.gate
    return gate is not None and not gate.is_mine


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block; afterwards each module has its former mode.

    While a training runs in the background, the block runs between two of its steps.
    """
    from nbpeft.engine.changes.called_modules import called_modules
    from nbpeft.engine.tree.model_tree import manager_of  # not at the top of the file, as they import torch

    interrupts, manager = DeferredInterrupts(), manager_of(model)
    with nullcontext() if manager is None else manager.active_state.hold(__name__), interrupts:
        training = [module for module in called_modules(model) if module.training]
        try:
            if training:
                model.eval()
            with interrupts.released():
                yield
        finally:
            for module in training:
                module.training = True


def _padded(row: Sequence[int], fill: list[int], left: bool) -> list[int]:
    return [*fill, *row] if left else [*row, *fill]


def _messages(prompt: Prompt, system: str) -> Conversation:
    """The messages of a prompt, with a system prompt if they have none."""
    if isinstance(prompt, str):
        _refuse_empty(prompt)
        messages: Conversation = ({"role": "user", "content": prompt},)
    else:
        messages = tuple(prompt) if isinstance(prompt, list | tuple) else ()
        if not messages or not all(isinstance(item, Mapping) and "role" in item for item in messages):
            expected = "a text, or a conversation [{'role': 'user', 'content': '…'}, …]"
            raise AdapterError(f"a prompt is {expected}, not {shown(prompt)}")
        if messages[-1]["role"] == "assistant":
            raise AdapterError("the conversation ends with the assistant's answer: remove it (messages[:-1])")
    begins = messages[0]["role"] in ("system", "developer")
    return messages if begins or not system else ({"role": "system", "content": system}, *messages)


def _rendered(messages: Conversation, tokenizer: Any, template: Mapping[str, Any]) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **template)
    except Exception as error:  # a template runs code of its own and may raise anything to refuse a chat
        why = in_one_line(error) or type(error).__name__
        raise AdapterError(f"the chat template refuses the prompt: {why:.200}") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokens(prompt: str, tokenizer: Any) -> list[int]:
    _refuse_empty(prompt)
    return list(tokenizer(prompt)["input_ids"])


def _refuse_empty(prompt: str) -> None:
    if not prompt.strip():
        raise AdapterError("a prompt is empty")


def _words(prompt: Prompt) -> str:
    """The text of a prompt; of a conversation the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def _end_tokens(base: Any, tokenizer: Any) -> frozenset[int]:
    configured = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    model_ends = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(token for token in (*model_ends, getattr(tokenizer, "eos_token_id", None)) if token is not None)
