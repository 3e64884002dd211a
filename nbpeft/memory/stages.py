"""Tracks the stages of a step (which layer, forward or backward) and extrapolates the peak to more layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most memory is allocated, in addition to what was allocated before the step.

    Attributes:
        total: all bytes at that moment.
        saved: bytes among them that are saved for backward.
        gradients: bytes among them that are gradients of parameters.
        result: bytes of the tensors in the step's result at its end.
    """

    total: int
    saved: int
    gradients: int
    result: int = 0

    def plus(self, other: Peak, times: int = 1) -> Peak:
        """Return the sum of this peak and a multiple of another one."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Peak(*(mine + times * theirs for mine, theirs in pairs))

    def towards(self, other: Peak, share: float) -> Peak:
        """Interpolate linearly between this peak and another one, or extrapolate.

        Args:
            other: the other peak.
            share: 0 for this peak, 1 for the other one; may be outside of this range.
        """
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Peak(*(round(mine + share * (theirs - mine)) for mine, theirs in pairs))


NOTHING = Peak(0, 0, 0)


class Stages:
    """Follows a step through the layers that are run, and records the peak of each stage in which the maximum can be.

    Three equal layers are enough to extrapolate to any number. Further layers are treated as inserted before
    the last one; each adds the same as the middle layer:

    - to the peak in forward: what the middle layer's forward adds to the allocated memory;
    - to the peak in backward of the last layer: what the middle layer holds when backward begins;
    - to the peak in backward of the first layer: the same, and the change during the middle layer's own backward.

    In between, backward frees one layer after another, so the peak is not there.

    Args:
        layers: the layers that are run, at least three; empty to record one peak of the whole step.
        now: returns the memory that is allocated now.
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
        """Record that a layer's forward begins; with checkpointing it begins again in backward, which is ignored."""
        self._marks.setdefault(f"into {name}", self._now())
        if name == "last" and not self._stage:
            self._stage = "forward"

    def backward_begins(self) -> None:
        """Record that backward begins."""
        if self._stage == "forward":
            self._stage = "backward"
            self._marks["backward"] = Peak(sum(self._middle.values()), 0, 0)

    def finished(self, parameter: Any) -> None:
        """Record that the gradient of a parameter is complete."""
        name = self._layer_of.get(id(parameter))
        if name is None:
            return
        self._left[name] -= 1
        if not self._left[name]:
            self._marks[f"out of {name}"] = self._now()
            self._stage = {"last": "between", "middle": "first layer"}[name]

    def allocated(self, key: int, byte_count: int, total: int) -> None:
        """Record that a storage was allocated.

        Args:
            key: identifies the storage.
            byte_count: its size in bytes.
            total: all allocated bytes, including the temporary memory of the operation.
        """
        if "into middle" in self._marks and not self._stage:
            self._middle[key] = byte_count
        self.reached(total)

    def reached(self, total: int) -> None:
        """Record that ``total`` bytes are allocated, including the temporary memory of the operation."""
        if self._stage in self._peaks and total > self._peaks[self._stage].total:
            self._peaks[self._stage] = dataclasses.replace(self._now(), total=total)

    def freed(self, key: int) -> None:
        """Record that a storage was freed."""
        self._middle.pop(key, None)

    def peak(self, result: int, more: int) -> Peak | None:
        """Return the peak with more layers than were run.

        Args:
            result: bytes of the tensors in the step's result.
            more: number of further layers.

        Returns:
            The peak; None if the layers were not run one after the other.
        """
        if not self._count:
            return dataclasses.replace(self._peaks["whole"], result=result)
        marks = self._marks
        if "into last" not in marks or "into middle" not in marks:
            return None
        entered = marks["into last"].plus(marks["into middle"], -1)
        peaks = [self._peaks["forward"].plus(entered, more)]
        if "backward" in marks:
            per_layer = dataclasses.replace(marks["backward"], saved=entered.saved)
            peaks.append(self._peaks["backward"].plus(per_layer, more))
        if "out of middle" in marks:
            passed = marks["out of middle"].plus(marks["out of last"], -1)
            peaks.append(self._peaks["first layer"].plus(per_layer.plus(passed), more))
        return max(peaks, key=lambda peak: peak.total).plus(Peak(0, 0, 0, result + more * (result // self._count)))
