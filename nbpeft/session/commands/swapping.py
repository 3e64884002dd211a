"""Hot-swapping: a saved adapter takes the place of one that is on the model."""

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
    """Put a saved adapter in the place of one that is on the model, which keeps its name; ``undo`` brings that back.

    Everything is checked before the first byte is copied, and a compiled model that was
    prepared for it goes on without compiling again.

    Args:
        path: a folder or a hub id.
        into: the adapter to replace; the active one if left out.
        validate: called with the model when the new adapter is in place and alone active; if it
            returns False or raises, the old one is put back, bit for bit.
        check_prompt: is answered before and after; an adapter whose weights or output
            are not finite is refused as by ``validate``.
        tokenizer: for ``check_prompt``; the one given before if left out.
        chat: see ``compare``.
        max_new_tokens: length of the answers to ``check_prompt``.
        replace: also one that was trained and is not saved.
        model: an adapted model; give the compiled one where it is compiled.

    Raises:
        HotSwapError: the new adapter cannot take the place, or was refused.
        CheckpointError: there is no checkpoint, it is damaged, or belongs to another base.
        UnknownAdapterError: there is no such adapter.
    """
    from nbpeft.model import hotswap_adapter

    place = place_of(path, "swap")
    tracked = ctx.find_adapted(model, command="swap")
    name = into if into is not None else _only_active(tracked)
    tracked.manager.require(name)
    if name in tracked.manager.unsaved and not replace:
        raise AdapterError(f"{name!r} was trained and is not saved: save it first, or replace it (replace=…)")
    tracked.manager.active_state.refuse_changes()
    target: Any = model if uncompiled(model) is not model else tracked.model
    batch = None if check_prompt is None else prompt_batch(ctx, tracked, [check_prompt], tokenizer, chat)
    checks = batch is not None or validate is not None
    check = _SwapCheck(tracked, name, batch, max_new_tokens, validate)
    with (
        ctx.command(f"swapping {name!r}", slow=True) as notes,
        nested_adapters_in_error(place),
        evaluating(tracked.model),
    ):
        before = check.generate([name])
        started = time.perf_counter()
        going = Undoable(ctx, tracked, name, "swapped", in_place=True)
        swapped = hotswap_adapter(target, place, name, validate=check if checks else None, done=going.on_removed)
        seconds = time.perf_counter() - started - check.seconds
        ctx.changed = True
        state = tracked.state()
        return SwapResult(
            tracked.name,
            place,
            adapter_in(state, name),
            swapped.layers,
            swapped.zeroed,
            swapped.reset,
            seconds,
            state,
            check_prompt or "",
            before,
            check.answer,
            tuple(notes),
        )


class _SwapCheck:
    """Judges a swapped adapter: by a prompt, then by the caller's function.

    Attributes:
        answer: what the new adapter answered to the prompt.
        seconds: how long judging took.
    """

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
        """Answer the prompt, if there is one, with the adapters of ``rows``, or with the active one."""
        if self._batch is None:
            return ""
        request = GenerationRequest(rows, self._max_new_tokens)
        answers, complete = generate_batch(self._tracked.model, self._batch, request)
        if not complete:
            raise KeyboardInterrupt
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
        raise AdapterError(f"say which adapter is to be replaced (into=…): {', '.join(tracked.manager.names)}")
    return active[0]
