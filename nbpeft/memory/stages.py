"""Where a step is among a model's layers, and what each further layer would add there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most is allocated, beyond what was there before it.

    Attributes:
        total: all bytes at that moment.
        saved: of these, kept for backward.
        gradients: of these, gradients of parameters.
        result: bytes of the tensors that the step's result still holds at its end.
    """

    total: int
    saved: int
    gradients: int
    result: int = 0

    def plus(self, other: Peak, times: int = 1) -> Peak:
        """Return the sum, with a multiple of another one."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Peak(*(mine + times * theirs for mine, theirs in pairs))

    def towards(self, other: Peak, share: float) -> Peak:
        """Return what is on the straight line to another one, after that share of the way; it may lie beyond."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Peak(*(round(mine + share * (theirs - mine)) for mine, theirs in pairs))


NOTHING = Peak(0, 0, 0)


class Stages:
    """Follows a step through the layers that are run, and keeps the peak of each stage that can hold the highest.

    Three equal layers are enough to know any number: every further one would stand before the last one. It adds
    in forward what the one in the middle adds to what is allocated; in backward of the last one, what the one in
    the middle holds when backward begins; and for backward of the first one, also what its own backward changes.
    In between, backward frees one layer after another, so the peak is not there.

    Args:
        layers: the layers that are run, at least three; empty to keep one peak of the whole step.
        now: returns what is allocated.
    """

    def __init__(self, layers: Sequence[nn.Module], now: Callable[[], Peak]) -> None:
        self._now = now
        self._count = len(layers)
        self._stage = "" if self._count else "whole"
        self._peaks = dict.fromkeys(("whole", "forward", "backward", "first layer"), NOTHING)
        self._marks: dict[str, Peak] = {}
        self._left: dict[str, int] = {}
        self._layer_of: dict[int, str] = {}
        self._middle: dict[int, int] = {}
        for name, layer in zip(("last", "middle"), reversed(layers), strict=False):
            self._follow(name, layer)

    def _follow(self, name: str, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(lambda *_: self._entered(name))
        trained = [id(parameter) for parameter in layer.parameters() if parameter.requires_grad]
        self._left[name] = len(trained)
        self._layer_of |= dict.fromkeys(trained, name)

    def _entered(self, name: str) -> None:
        """A layer begins; once more in backward, where layers are computed again."""
        self._marks.setdefault(f"into {name}", self._now())
        if name == "last" and not self._stage:
            self._stage = "forward"

    def backward_begins(self) -> None:
        """Backward begins."""
        if self._stage == "forward":
            self._stage = "backward"
            self._marks["backward"] = Peak(sum(self._middle.values()), 0, 0)

    def finished(self, parameter: Any) -> None:
        """The gradient of a parameter is complete."""
        name = self._layer_of.get(id(parameter))
        if name is None:
            return
        self._left[name] -= 1
        if not self._left[name]:
            self._marks[f"out of {name}"] = self._now()
            self._stage = {"last": "between", "middle": "first layer"}[name]

    def allocated(self, key: int, byte_count: int, total: int) -> None:
        """A storage was allocated, and with what is needed for that moment so many bytes are now."""
        if "into middle" in self._marks and not self._stage:
            self._middle[key] = byte_count
        self.reached(total)

    def reached(self, total: int) -> None:
        """With what is needed for that moment so many bytes are allocated."""
        if self._stage in self._peaks and total > self._peaks[self._stage].total:
            self._peaks[self._stage] = dataclasses.replace(self._now(), total=total)

    def freed(self, key: int) -> None:
        """A storage was freed."""
        self._middle.pop(key, None)

    def peak(self, result: int, more: int) -> Peak | None:
        """Return the peak with that many more layers.

        Args:
            result: bytes that the result of the step holds.
            more: layers beyond those that were run.

        Returns:
            None where the layers were not run one after the other.
        """
        if not self._count:
            return dataclasses.replace(self._peaks["whole"], result=result)
        marks = self._marks
        if "into last" not in marks or "into middle" not in marks:
            return None
        entered = marks["into last"].plus(marks["into middle"], -1)
        peaks = [self._peaks["forward"].plus(entered, more)]
        if "backward" in marks:
            held = dataclasses.replace(marks["backward"], saved=entered.saved)
            peaks.append(self._peaks["backward"].plus(held, more))
        if "out of middle" in marks:
            passed = marks["out of middle"].plus(marks["out of last"], -1)
            peaks.append(self._peaks["first layer"].plus(held.plus(passed), more))
        return max(peaks, key=lambda peak: peak.total).plus(Peak(0, 0, 0, result + more * (result // self._count)))
