"""The share of rows that a model answers exactly as expected."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbpeft.display.blocks import Card, Table, Text, card, dim, line
from nbpeft.display.numbers import percent
from nbpeft.display.shown import Shown
from nbpeft.errors import ConfigError
from nbpeft.examples.progress import Progress
from nbpeft.examples.tasks import Row

_SHOWN = 5
"""The number of answers in the card of a score."""
_WORTH_SHARING = 32
"""The number of common tokens from which the prompts' shared beginning is processed only once."""


@dataclass(frozen=True, repr=False)
class Score(Shown):
    """The answers of a model to some rows, and the share of correct ones.

    Attributes:
        rows: the rows.
        answers: the model's answer to each row, up to the first line break.
        prompt_tokens: the average number of tokens of a prompt.
        seconds: the duration, in seconds.
        label: a name of what was scored.
    """

    rows: tuple[Row, ...]
    answers: tuple[str, ...]
    prompt_tokens: float
    seconds: float
    label: str = ""

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether each answer equals the expected completion."""
        return tuple(answer == row["completion"].strip() for row, answer in zip(self.rows, self.answers, strict=True))

    @property
    def share(self) -> float:
        """The share of correct answers, from 0 to 1."""
        return sum(self.correct) / len(self.rows)

    def __float__(self) -> float:
        return self.share

    def __str__(self) -> str:
        name = f"{self.label}: " if self.label else ""
        return f"{name}{sum(self.correct)} of {len(self.rows)} correct ({percent(self.share)}) in {self.seconds:.0f} s"

    def view(self) -> Card:
        """The share, and the first answers, wrong ones first."""
        order = sorted(range(len(self.rows)), key=lambda number: self.correct[number])[:_SHOWN]
        rows = tuple(
            (
                Text(self.rows[number]["prompt"].rpartition("\n\n")[2], wrap="as is"),
                self.rows[number]["completion"].strip(),
                Text(self.answers[number] or "(nothing)", "" if self.correct[number] else "error", wrap="as is"),
            )
            for number in order
        )
        aside = f"{self.prompt_tokens:.0f} tokens a prompt · {self.seconds:.0f} s"
        more = len(self.rows) - len(order)
        return card(
            f"{self.label or 'score'} · {sum(self.correct)} of {len(self.rows)} correct ({percent(self.share)})",
            Table(("prompt", "wanted", "answer"), rows),
            line(dim(f"and {more} more")) if more else None,
            aside=aside,
        )


def score(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    label: str = "",
    batch_size: int = 16,
    progress: bool = True,
    **options: Any,
) -> Score:
    """Scores a model: the share of rows that it answers exactly as expected, with greedy decoding.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        rows: the rows, with ``prompt`` and ``completion``.
        label: a name of what is scored, for the progress line and the result.
        batch_size: number of rows answered in one batch.
        progress: whether to show a progress line.
        **options: further arguments of ``model.generate``, e.g. ``adapter_names`` with one name for each row.
            ``max_new_tokens`` is by default one more than the tokens of the longest completion.

    Returns:
        The score, with the answers.

    Raises:
        ConfigError: there are no rows, or the number of ``adapter_names`` differs.
    """
    if not rows:
        raise ConfigError("there are no rows to score")
    names = options.pop("adapter_names", None)
    if names is not None and len(names) != len(rows):
        raise ConfigError(f"adapter_names has {len(names)} names for {len(rows)} rows", field="adapter_names")
    given_answers: list[str] = []
    start = time.monotonic()
    with Progress(label or "scoring", len(rows), show=progress) as bar:
        prompts = [row["prompt"] for row in rows]
        shared = shared_beginning(model, tokenizer, prompts) if names is None else None
        longest = max(len(tokenizer(row["completion"]).input_ids) for row in rows) + 1
        options.setdefault("max_new_tokens", longest)
        for place in range(0, len(rows), batch_size):
            batch = prompts[place : place + batch_size]
            chosen = {"adapter_names": names[place : place + batch_size]} if names is not None else {"shared": shared}
            given_answers += answers(model, tokenizer, batch, **chosen, **options)
            bar.advance(len(batch))
        tokens = [len(tokenizer(prompt).input_ids) for prompt in prompts]
        mean = sum(tokens) / len(tokens)
        result = Score(tuple(rows), tuple(given_answers), mean, time.monotonic() - start, label)
        bar.done(str(result))
    return result


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 32, shared: Any = None, **options: Any
) -> list[str]:
    """The answers of a model to prompts, up to the first line break, with greedy decoding.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        prompts: the prompts, answered in one batch.
        max_new_tokens: the limit of an answer, in tokens.
        shared: the result of ``shared_beginning`` for these prompts, whose beginning is then not processed again.
        **options: further arguments of ``model.generate``.

    Returns:
        One answer for each prompt.
    """
    import torch

    from nbpeft.training.watching.generation import evaluating

    with evaluating(model), torch.no_grad():
        batch = _batch(tokenizer, prompts, shared).to(model.device)
        if shared is not None:
            options[_cache_option(model)] = shared.repeated(len(prompts))
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=_ends(tokenizer),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in texts]


@dataclass(frozen=True)
class SharedBeginning:
    """The tokens with which all prompts begin, such as solved examples, and the model's KV cache of them.

    Attributes:
        tokens: the tokens at the beginning of each prompt.
        cache: keys and values of these tokens, for one row.
    """

    tokens: tuple[int, ...]
    cache: Any

    def repeated(self, rows: int) -> Any:
        """A copy of the cache for a batch with this number of rows."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


def shared_beginning(model: Any, tokenizer: Any, prompts: Sequence[str]) -> SharedBeginning | None:
    """Processes the common beginning of all prompts once, if it is long enough to save time.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        prompts: the prompts.

    Returns:
        The beginning with its cache; None if it is too short.
    """
    import torch
    from transformers import DynamicCache

    from nbpeft.training.watching.generation import evaluating

    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    first, last = min(encoded), max(encoded)
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    same = min(same, min(map(len, encoded)) - 1)
    if len(prompts) < 2 or same < _WORTH_SHARING or getattr(model.config, "is_encoder_decoder", False):
        return None
    tokens, cache = tuple(first[:same]), DynamicCache(config=model.config)
    options = {_cache_option(model): cache, "use_cache": True, "logits_to_keep": 1}
    with evaluating(model), torch.no_grad():
        model(input_ids=torch.tensor([tokens], device=model.device), **options)
    return SharedBeginning(tokens, cache)


def _cache_option(model: Any) -> str:
    """The name of the model's argument for a cache, which newer versions of transformers have changed."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _batch(tokenizer: Any, prompts: Sequence[str], shared: SharedBeginning | None) -> Any:
    """Prompts padded on the left, or between their shared beginning and the rest."""
    import torch

    if shared is None:
        return tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    shared_count = len(shared.tokens)
    rests = [tokenizer(prompt).input_ids[shared_count:] for prompt in prompts]
    batch = tokenizer.pad({"input_ids": rests}, return_tensors="pt", padding=True, padding_side="left")
    for name, beginning in (("input_ids", shared.tokens), ("attention_mask", (1,) * shared_count)):
        column = batch[name].new_tensor(beginning).expand(len(rests), shared_count)
        batch[name] = torch.cat([column, batch[name]], dim=1)
    return batch


def _ends(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the end of the text, and line breaks that are a single token."""
    ends = {tokenizer.eos_token_id}
    for text in ("\n", "\n\n"):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        ends |= set(encoded if len(encoded) == 1 else ())
    return sorted(ends - {None})
