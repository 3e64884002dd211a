"""Hot-swapping: replacing an adapter on the model by a saved one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError
from nbpeft.session.checks import place_of
from nbpeft.session.commands.adapters import adapter_in, nested_adapters_in_error
from nbpeft.session.handles import uncompiled
from nbpeft.session.prompts import prompt_batch
from nbpeft.session.results.combining import SwapResult
from nbpeft.session.undoable import Undoable
from nbpeft.training.watching.generation import GenerationRequest, PromptBatch, check_finite, evaluating, generate_batch

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel


def swap(
    ctx: SessionContext,
    path: str | os.PathLike[str],
    *,
    into: str | None = None,
    validate: Callable[[nn.Module], object] | None = None,
    check_prompt: str | None = None,
    tokenizer: Any = None,
    chat: bool | None = None,
    max_new_tokens: int = 32,
    replace: bool = False,
    model: ModelLike = None,
) -> SwapResult:
    """Replace an adapter on the model by a saved one, which gets its name; ``undo`` restores the old one.

    Everything is checked before the first byte is copied. A compiled model that was prepared for hot-swapping is not
    recompiled.

    Args:
        path: a folder or a hub id.
        into: name of the adapter to replace; None for the active one.
        validate: called with the model after the swap, when the new adapter is the only active one. If it returns
            False or raises, the old adapter is restored bit for bit.
        check_prompt: answered before and after the swap. An adapter with non-finite weights or outputs is refused, as
            by ``validate``.
        tokenizer: tokenizer for ``check_prompt``; the last one given if None.
        chat: see ``compare``.
        max_new_tokens: maximal number of new tokens of the answers to ``check_prompt``.
        replace: also replace an adapter that was trained and is not saved.
        model: an adapted model; if it is compiled, the compiled one.

    Raises:
        HotSwapError: the new adapter cannot replace the old one, or was refused.
        CheckpointError: there is no checkpoint, it is damaged, or belongs to another base.
        UnknownAdapterError: there is no such adapter.
    """
    from nbpeft.model import hotswap_adapter

    place = place_of(path, "swap")
    tracked = ctx.find_adapted(model, command="swap", adapters=(into,))
    name = into if into is not None else _only_active(tracked)
    tracked.manager.require(name)
    if name in tracked.manager.unsaved and not replace:
        raise AdapterError(f"{name!r} was trained and is not saved: save it first, or replace it (replace=…)")
    tracked.manager.active_state.refuse_changes()
    target: Any = model if uncompiled(model) is not model else tracked.model
    batch = None if check_prompt is None else prompt_batch(ctx, tracked, [check_prompt], tokenizer, chat, None, [name])
    checks = batch is not None or validate is not None
    check = _SwapCheck(tracked, name, batch, max_new_tokens, validate)
    with (
        ctx.command(f"swapping {name!r}", slow=True) as notes,
        nested_adapters_in_error(place),
        evaluating(tracked.model),
    ):
        before = check.generate([name])
        started = time.perf_counter()
        undoable = Undoable(ctx, tracked, name, "swapped", in_place=True)
        swapped = hotswap_adapter(target, place, name, validate=check if checks else None, done=undoable.on_removed)
        seconds = time.perf_counter() - started - check.seconds
        ctx.changed = True
        state = tracked.state()
        adapter, answers = adapter_in(state, name), (check_prompt or "", before, check.answer)
        return SwapResult(tracked.name, place, adapter, swapped, seconds, state, *answers, notes=tuple(notes))


class _SwapCheck:
    """Checks a swapped adapter: with a prompt, then with the caller's function."""

    def __init__(
        self,
        tracked: TrackedModel,
        name: str,
        batch: PromptBatch | None,
        max_new_tokens: int,
        validate: Callable[[nn.Module], object] | None,
    ) -> None:
        self._tracked, self._name, self._batch, self._validate = tracked, name, batch, validate
        self._max_new_tokens = max_new_tokens
        self.answer, self.seconds = "", 0.0

    def generate(self, rows: list[str] | None = None) -> str:
        """Answer the prompt, if there is one, with the adapters in ``rows``, or with the active one."""
        if self._batch is None:
            return ""
        request = GenerationRequest(rows, self._max_new_tokens)
        answers, complete = generate_batch(self._tracked.model, self._batch, request)
        if not complete:
            raise KeyboardInterrupt  # generate_batch returned early because of it
        return answers[0].text

    def __call__(self, model: nn.Module) -> object:
        started = time.perf_counter()
        try:
            if self._batch is not None:
                check_finite(self._tracked.model, self._name, self._batch)
                self.answer = self.generate()
            return None if self._validate is None else self._validate(model)
        finally:
            self.seconds = time.perf_counter() - started


def _only_active(tracked: TrackedModel) -> str:
    active = tracked.manager.active
    if len(active) != 1:
        raise AdapterError(f"name the adapter to replace (into=…): {', '.join(tracked.manager.names)}")
    return active[0]
