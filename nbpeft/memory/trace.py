"""What a step allocates as formulas in batch size, length and rank, from two runs on fake tensors.

Every tensor's size is a product ``c · batch^i · length^j · rank^k``. Two runs with other batch
sizes, lengths and ranks tell ``c``, ``i``, ``j`` and ``k`` of each; the sums of those that are there
at a moment follow, and so the peak at any batch size, length and rank, without another run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.memory.saved import SavedTensors, tensors_in
from nbpeft.memory.timeline import Allocations, Peak, finished_gradients, phase_of


@dataclass(frozen=True)
class Point:
    """Where a step is looked at."""

    batch_size: int
    sequence_length: int
    rank: int


FIRST, SECOND = Point(7, 1009, 11), Point(13, 1511, 29)
"""Ratios whose products all differ, so that a ratio of two sizes tells the exponents."""

_NEAR = 2e-3
"""Sizes that are rounded up, or of a length one shorter or longer, miss their product by less than this."""

Term = tuple[int, int, int]
"""Exponents of batch size, length and rank."""

_TERMS: tuple[Term, ...] = tuple(
    sorted(itertools.product(range(3), range(3), range(3)), key=lambda term: (sum(term), term))
)


class IrregularError(Exception):
    """The two runs differ in more than sizes, or a size is no product."""


def _value(term: Term, point: Point) -> int:
    batch, length, rank = term
    return int(point.batch_size**batch * point.sequence_length**length * point.rank**rank)


@dataclass
class Log:
    """What happened in a run, in order.

    Attributes:
        events: ``(kind, number)``; kinds are ``made`` and ``freed`` (of a storage), ``kept`` and
            ``dropped`` (of a storage for backward), ``scratch`` (of a size, before a storage is
            made) and ``gradient`` (of a size).
        sizes: bytes by number.
        held: storages that the step's result holds.
    """

    events: list[tuple[str, int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    trained: int = 0
    phases: int = 1

    def add(self, kind: str, byte_count: int) -> int:
        """A new number of that size, with its event."""
        self.sizes.append(byte_count)
        self.events.append((kind, len(self.sizes) - 1))
        return len(self.sizes) - 1


class _Recorder(Allocations):  # type: ignore[no-untyped-call]
    """Writes the log."""

    def __init__(self, log: Log, saved: _Kept, before: Sequence[Tensor]) -> None:
        super().__init__(before, saved, [], 1, 1)
        self._log = log
        self._numbers: dict[int, int] = saved.numbers

    def _risen(self, key: int, byte_count: int, scratch: int) -> None:
        if scratch:
            self._log.add("scratch", scratch)
        self._numbers[key] = self._log.add("made", byte_count)

    def _freed(self, key: int, byte_count: int) -> None:
        super()._freed(key, byte_count)
        number = self._numbers.pop(key, None)
        if number is not None:
            self._log.events.append(("freed", number))


class _Kept(SavedTensors):
    """Writes what is kept for backward."""

    def __init__(self, model: nn.Module, log: Log) -> None:
        super().__init__(model)
        self._log = log
        self.numbers: dict[int, int] = {}
        self._kept: dict[Any, int] = {}

    def _pack(self, tensor: Tensor) -> Any:
        before = self.byte_count
        kept = super()._pack(tensor)
        if self.byte_count != before:
            key = tensor.untyped_storage()._cdata
            number = self.numbers.get(key)
            if number is None:  # made before the step
                number = self._log.add("kept", self.byte_count - before)
            else:
                self._log.events.append(("kept", number))
            self._kept[key] = number
        return kept

    def _release(self, key: Any, byte_count: int) -> None:
        before = self.byte_count
        super()._release(key, byte_count)
        if self.byte_count != before:
            self._log.events.append(("dropped", self._kept.pop(key)))


def write_log(model: nn.Module, step: Callable[[], Any], phases: int) -> Log:
    """Runs a step and writes down what it allocates."""
    log = Log(phases=phases, trained=sum(parameter.requires_grad for parameter in model.parameters()))
    saved = _Kept(model, log)
    with ExitStack() as stack:
        stack.enter_context(saved)
        stack.enter_context(finished_gradients(model, lambda size: log.add("gradient", size)))
        with _Recorder(log, saved, [*model.parameters(), *model.buffers()]):
            result = step()
            keys = {tensor.untyped_storage()._cdata for tensor in tensors_in(result)}
            log.held = [saved.numbers[key] for key in keys if key in saved.numbers]
    return log


class Trace:
    """The peak of a step as a function of batch size, length and rank.

    Args:
        first: the log of a run.
        second: the log of another run, the same but for sizes.
        points: of the runs.

    Raises:
        IrregularError: the runs differ in more than sizes, or a size is no product.
    """

    def __init__(self, first: Log, second: Log, points: tuple[Point, Point] = (FIRST, SECOND)) -> None:
        made = [[event for event in log.events if event[0] not in ("freed", "dropped")] for log in (first, second)]
        if made[0] != made[1]:
            raise IrregularError("the step does other things at other sizes")
        products = [_product((one, two), points) for one, two in zip(first.sizes, second.sizes, strict=True)]
        self._terms = tuple(dict.fromkeys(term for term, _ in products))
        place = {term: column for column, term in enumerate(self._terms)}
        self._coefficients = [(place[term], factor) for term, factor in products]
        self._held = self._sum(first.held)
        self._phases = first.phases
        self._build(first)

    def _sum(self, numbers: Sequence[int]) -> Tensor:
        total = torch.zeros(len(self._terms), dtype=torch.float64)
        for number in numbers:
            column, factor = self._coefficients[number]
            total[column] += factor
        return total

    def _build(self, log: Log) -> None:
        """Rows of coefficients: what is there after every event that adds something, and of it kept and gradients."""
        width = len(self._terms)
        now, kept, gradients, scratch = ([0.0] * width for _ in range(4))
        rows: list[list[list[float]]] = [[] for _ in range(3)]
        phases, finished = [], 0
        for kind, number in log.events:
            column, factor = self._coefficients[number]
            if kind == "made":
                now[column] += factor
                rows[0].append([a + b for a, b in zip(now, scratch, strict=True)])
                rows[1].append(list(kept))
                rows[2].append(list(gradients))
                phases.append(phase_of(finished, log.trained, log.phases))
                scratch = [0.0] * width
            elif kind == "freed":
                now[column] -= factor
            elif kind in ("kept", "dropped"):
                kept[column] += factor if kind == "kept" else -factor
            elif kind == "gradient":
                gradients[column] += factor
                finished += 1
            else:
                scratch[column] += factor
        self._rows = torch.tensor(rows, dtype=torch.float64).reshape(3, len(phases), width)
        self._phase = torch.tensor(phases)

    def peaks(self, point: Point) -> list[Peak]:
        """The peak of each phase, as ``record`` finds it."""
        values = torch.tensor([float(_value(term, point)) for term in self._terms], dtype=torch.float64)
        total, kept, gradients = self._rows @ values
        held = round(float(self._held @ values))
        peaks = []
        for phase in range(self._phases):
            there = torch.where(self._phase == phase, total, -1.0)
            if len(there) == 0 or float(there.max()) <= 0:
                peaks.append(Peak(0, 0, 0, held))
                continue
            moment = int(there.argmax())
            at_peak = [round(float(column[moment])) for column in (total, kept, gradients)]
            peaks.append(Peak(at_peak[0], at_peak[1], at_peak[2], held))
        return peaks


def _product(sizes: tuple[int, int], points: tuple[Point, Point]) -> tuple[Term, float]:
    """Exponents and factor of a size, from its values in the two runs."""
    first, second = sizes
    if first == second:
        return (0, 0, 0), float(first)
    best = min(_TERMS, key=lambda term: _miss(term, sizes, points))
    if _miss(best, sizes, points) > _NEAR:
        raise IrregularError(f"a size of {first} and {second} bytes is no product")
    return best, second / _value(best, points[1])


def _miss(term: Term, sizes: tuple[int, int], points: tuple[Point, Point]) -> float:
    foreseen = sizes[0] * _value(term, points[1]) / _value(term, points[0])
    return abs(foreseen / max(sizes[1], 1) - 1)
