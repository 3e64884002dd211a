"""Asking the active adapters, or others, for one answer, and conversations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from nbpeft._util.conversations import is_conversation
from nbpeft.errors import AdapterError
from nbpeft.session.checks import names_of
from nbpeft.session.prompts import NO_TEMPLATE, prompt_batch
from nbpeft.session.results.asking import AskResult
from nbpeft.session.results.comparing import BASE, Answer
from nbpeft.session.sampling import Sampling
from nbpeft.training.watching.generation import GenerationRequest, answered, evaluating, generate_batch, waits

if TYPE_CHECKING:
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.session.context import Earlier, ModelLike, SessionContext
    from nbpeft.session.results.comparing import Status, Turn
    from nbpeft.training.watching.generation import Prompt, PromptBatch


def ask(
    ctx: SessionContext,
    /,
    prompt: Prompt,
    *,
    adapter: str | Sequence[str] | None = None,
    follow_up: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 256,
    seed: int | None = None,
    tokenizer: Any = None,
    chat: bool | None = None,
    system: str | None = None,
    on_text: Callable[[AskResult], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
    model: ModelLike = None,
    **generation: Any,
) -> AskResult:
    """Generate a model's answer to a prompt. The active adapters do not change.

    After an interruption the result has the status ``stopped`` and the answer so far. While a training runs in the
    background, the answer is generated between two of its steps.

    Args:
        prompt: a text, or a conversation in the format of chat templates.
        adapter: name of an adapter, several names for the sum of their deltas, or ``base``; None for the active ones.
        follow_up: continue the last conversation with that adapter instead of starting a new one.
        temperature: sampling temperature; 0, the default, is greedy.
        top_p: sample from the most likely tokens whose probabilities sum up to this value.
        max_new_tokens: maximal number of new tokens.
        seed: seed of the random numbers, which are separate from those of the notebook.
        tokenizer: the model's tokenizer; the last one given if None.
        chat: apply the tokenizer's chat template to a text; None decides by how the adapters were trained, or else by
            whether the tokenizer has one.
        system: the system prompt, empty for none; None for that of the rows the adapters were trained on.
        on_text: called with the answer so far, several times per second.
        should_stop: called after each token; True ends the answer early.
        model: an adapted model.
        **generation: further arguments of ``generate``.

    Raises:
        UnknownAdapterError: there is no such adapter.
        ConfigError: a setting is invalid.
        AdapterError: there is no tokenizer, or no conversation to continue.
    """
    sampling = Sampling(temperature, top_p, seed)
    if isinstance(prompt, list | tuple) and not is_conversation(prompt):
        raise AdapterError("ask answers one prompt, a text or a conversation; session.compare() takes several")
    named = () if adapter is None else names_of(adapter)
    tracked = ctx.find_adapted(model, command="ask", adapters=[name for name in named if name != BASE])
    manager = tracked.manager
    names = _names(manager, adapter)
    title = " + ".join(manager.active if manager.enabled else ()) if names is None else " + ".join(names)
    title = title or BASE
    conversations = ctx.conversations.setdefault(manager.model, {})
    turns: tuple[Turn, ...] = ()
    answering = manager.active if names is None else names
    batch = prompt_batch(ctx, tracked, [prompt], tokenizer, chat, system, answering)
    if follow_up:
        turns, earlier = _earlier(conversations, title, batch)
        batch = prompt_batch(ctx, tracked, [prompt], tokenizer, chat, system, answering, earlier)

    def result(answer: Answer, status: Status, notes: Sequence[str] = ()) -> AskResult:
        seconds, how = time.perf_counter() - started, (sampling.settings, turns, status, batch.form, batch.system)
        return AskResult(tracked.name, title, batch.prompts[0], answer, seconds, *how, notes=tuple(notes))

    def report(answers: list[Answer]) -> None:
        if on_text is not None:
            on_text(result(answers[0], "running"))

    options = sampling.options | generation
    request = GenerationRequest(None, max_new_tokens, options, None if on_text is None else report, should_stop)
    started = time.perf_counter()
    with ctx.command("asking", slow=True) as notes:
        if on_text is not None:
            on_text(result(Answer(), "waiting" if waits(tracked.model) else "running"))
        with evaluating(tracked.model), sampling.random_numbers(), _serving(manager, names):
            started = time.perf_counter()
            answers, complete = generate_batch(tracked.model, batch, request)
        made = result(answers[0], "finished" if complete else "stopped", (*notes, *sampling.notes))
    if batch.chat:
        text = answers[0].text
        conversations[title] = ((*turns, (batch.prompts[0], text)), answered(batch.conversations[0], text))
    return made


def _earlier(conversations: Mapping[str, Earlier], title: str, batch: PromptBatch) -> Earlier:
    """Return the turns and the messages of the conversation to continue."""
    if not batch.chat:
        raise AdapterError(NO_TEMPLATE)
    if title not in conversations:
        raise AdapterError(f"there is no conversation with {title} to continue yet")
    return conversations[title]


def _names(manager: AdapterManager, adapter: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the adapters that answer: an empty tuple for the base model, None for the active ones."""
    if adapter is None:
        return None
    names = tuple(dict.fromkeys(names_of(adapter)))
    manager.refuse_merged("asking another than the merged adapters")
    if names == (BASE,) and BASE not in manager.names:
        return ()
    manager.require_available(*names)
    return names


def _serving(manager: AdapterManager, names: tuple[str, ...] | None) -> AbstractContextManager[None]:
    from nbpeft.model.handle.serving import blended

    if names is None or not manager.names:
        return nullcontext()
    return blended(manager, dict.fromkeys(names, 1.0) or dict.fromkeys(manager.names, 0.0))
