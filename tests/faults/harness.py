"""One command tried again and again on the same model, with something that goes wrong each time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dis import get_instructions
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nbpeft
from tests.faults.commands import COMMANDS, STORAGES, Command, Stage, run_quietly, saved, state_of, tiny, twin

PACKAGE = str(Path(nbpeft.__file__).parent)
CASES = [(name, storage) for name in COMMANDS for storage in STORAGES if storage == "dense" or "merge" in name]
"""Commands, and the kinds of weights that they are tried on: quantized ones where they are written."""


Operation = tuple[int, str]
"""The number of an operation on tensors, and whether an error comes before or behind it."""


class FailingAt(TorchDispatchMode):
    """Raises MemoryError once, at an operation."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self._left, self._when = operation
        self.fired = False

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        self.fired = self._left <= 0
        if self._left == 0 and self._when == "before":
            raise MemoryError("pretended")
        result = func(*args, **(kwargs or {}))
        if self._left == 0:
            raise MemoryError("pretended")
        return result


@cache
def _block_ends(code: CodeType) -> frozenset[int]:
    """Where a function calls ``__exit__(None, None, None)`` of a ``with`` block."""
    steps = [step for step in get_instructions(code) if step.opname != "CACHE"]
    nones = [step.opname == "LOAD_CONST" and step.argval is None for step in steps]
    return frozenset(step.offset for n, step in enumerate(steps) if all(nones[n : n + 3]) and n + 3 < len(steps))


@contextmanager
def traced(visit: Callable[[str, int], None], only: tuple[str, int] | None = None) -> Iterator[None]:
    """Calls back at every line of the package that runs in the block, or of the function around one line.

    The end of a ``with`` block is no such line: CPython runs no signal handler between the last statement and
    ``__exit__``, so an interrupt there would leave a context entered that no real one leaves.
    """

    def local(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and frame.f_lasti not in _block_ends(frame.f_code):
            visit(frame.f_code.co_filename, frame.f_lineno)
        return local

    def start(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if only is None:
            return local if code.co_filename.startswith(PACKAGE) else None
        if code.co_filename != only[0] or code.co_firstlineno > only[1]:
            return None
        return local if only[1] in {line for _, _, line in code.co_lines()} else None

    before = sys.gettrace()
    sys.settrace(start)
    try:
        yield
    finally:
        sys.settrace(before)


class Harness:
    """One command on one kind of weights.

    Attributes:
        before: the state that the command finds.
        after: the one it leaves.
        base: that of the bare model.
    """

    def __init__(self, name: str, storage: str) -> None:
        self.command: Command = COMMANDS[name]
        self.storage = storage
        saved()
        self._made = self.command.stage(storage)
        self.before = state_of(self._made)
        self.base = state_of(Stage(tiny(storage)))
        done = self.stage()
        run_quietly(self.command, done)
        self.after = state_of(done)

    def stage(self) -> Stage:
        """A model as the command finds it."""
        return self.command.stage(self.storage) if self._made.pool is not None else twin(self._made)

    def run(self, stage: Stage, around: AbstractContextManager[object], failure: type[BaseException]) -> bool:
        """Runs the command.

        Args:
            stage: the model.
            around: makes something go wrong.
            failure: what the command may raise then; if it ``fired``, any error may tell of it.

        Returns:
            Whether it failed.
        """
        try:
            with around:
                run_quietly(self.command, stage)
        except failure:
            return True
        except Exception:
            if not getattr(around, "fired", False):
                raise
            return True
        return False

    def is_before(self, stage: Stage, what: str, *, failed: bool) -> bool:
        """Compares the state, which must be that before or after the command; whether it is the former."""
        assert torch.is_grad_enabled(), f"{what}: gradients are off"
        state = state_of(stage)
        if state == self.before:
            assert failed or state == self.after, f"{what}: nothing happened"
            return state != self.after
        if state != self.after:
            raise AssertionError(f"{what}: {differing(state, self.before, self.after)}")
        return False

    def settles(self, stage: Stage) -> None:
        """The same command works now, and unloading gives the true base."""
        run_quietly(self.command, stage)
        state = state_of(stage)
        if state != self.after:
            raise AssertionError(f"again: {differing(state, self.after, self.after)}")
        if stage.model is None or self.command.unloads:
            return
        wanted = self.stage()
        run_quietly(self.command, wanted)
        bare = [state_of(unloaded(one)) for one in (stage, wanted)]
        if bare[0] != bare[1]:
            raise AssertionError(f"unloaded: {differing(bare[0], bare[1], bare[1])}")
        if not self.command.writes_base:
            bits, base = ({k: v[0] for k, v in one.items() if k.startswith("tensor ")} for one in (bare[0], self.base))
            assert {key: bits.get(key) for key in base} == base, "the base model has changed"

    def try_all(
        self, points: list[Any], around: Callable[[Any], AbstractContextManager[object]], failure: type[BaseException]
    ) -> None:
        """Tries a failure at each point; one model serves until a command succeeds."""
        stage = self.stage()
        for point in points:
            failed = self.run(stage, around(point), failure)
            if not self.is_before(stage, f"{failure.__name__} at {point}", failed=failed):
                stage = self.stage()
        self.settles(stage)


def unloaded(stage: Stage) -> Stage:
    """The bare model."""
    run_quietly(Command(lambda storage: stage, lambda stage: stage.model.unload()), stage)
    return stage


def differing(state: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> str:
    """Where a state is neither."""
    keys = {*state, *before, *after}
    absent = object()
    odd = [key for key in keys if state.get(key, absent) not in (before.get(key, absent), after.get(key, absent))]
    mixed = [key for key in keys if before.get(key, absent) != after.get(key, absent)]
    as_before = [key for key in mixed if state.get(key, absent) == before.get(key, absent)]
    as_after = [key for key in mixed if state.get(key, absent) == after.get(key, absent)]
    values = {key: (state.get(key), before.get(key), after.get(key)) for key in sorted(odd)[:2]}
    return f"neither: {odd[:6]} {str(values)[:400]}; as before: {as_before[:4]}; as after: {as_after[:4]}"
