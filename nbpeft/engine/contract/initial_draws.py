"""The random numbers of new parameters, drawn in the same order as PEFT draws them.

Numbers come from torch's default generator, on the device and in the dtype in which torch makes new tensors (the CPU
and float32 by default). They are moved to the layer afterwards, so that a seed gives the same values on every device.
On a layer in half precision they are rounded to its dtype first.

The original implementation of a method often stores parameters in ``nn.Linear``, ``nn.Embedding`` or a convolution.
Their constructors draw numbers, which the method's own init then overwrites. Such numbers are drawn here too and
dropped: everything drawn later (the next layer, dropout, the order of the data) depends on how far the generator has
advanced. Each method does this in its ``create``, before its own init.

PEFT also initializes an adapter that it then loads. ``Draws`` advances the generator as far without the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.engine.changes.random_numbers import Advance, skip_words
from nbpeft.engine.contract.base import BaseLayer

Fill = Callable[[Tensor], Any]
"""Fills a tensor with random numbers, in place."""
_BLOCK = 16
"""Size from which ``Tensor.normal_`` draws one number for each value, and a last block of this size once more."""


def linear_(tensor: Tensor, fan_in: int = 0) -> Tensor:
    """Fills a tensor as ``nn.Linear`` and convolutions do: uniform in ±1 / sqrt(fan in).

    Args:
        tensor: a weight, (out, in, …), or a bias, for which ``fan_in`` is required.
        fan_in: number of inputs of each output; by default taken from the shape of the weight.

    Returns:
        ``tensor``.
    """
    bound = 1 / math.sqrt(fan_in) if fan_in else _bound(max(1, math.prod(tensor.shape[1:])))
    return tensor.uniform_(-bound, bound)


@lru_cache(maxsize=256)
def _bound(fan_in: int) -> float:
    """The bound that ``nn.init.kaiming_uniform_`` computes for a weight of ``nn.Linear``, rounded in the same way."""
    return math.sqrt(3.0) * (nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(fan_in))


def normal_(tensor: Tensor, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """Fills a tensor with normally distributed numbers and returns it."""
    return tensor.normal_(mean, std)


def uniform_(tensor: Tensor, bound: float) -> Tensor:
    """Fills a tensor with numbers that are uniform in ±bound and returns it."""
    return tensor.uniform_(-bound, bound)


@dataclass(frozen=True)
class Always:
    """A fill whose numbers PEFT draws before they are a parameter: with ``low_cpu_mem_usage=True``, too."""

    fill: Fill

    def __call__(self, tensor: Tensor) -> Any:
        return self.fill(tensor)


def drawn(
    shape: Sequence[int], fill: Fill, device: torch.device, dtype: torch.dtype, through: torch.dtype | None = None
) -> Tensor:
    """A new tensor of random numbers.

    Args:
        shape: shape of the tensor.
        fill: fills it in place.
        device: device of the result; on the meta device nothing is drawn.
        dtype: dtype of the result.
        through: a dtype that the numbers are rounded to first; None for no rounding.

    Returns:
        The tensor.
    """
    if device.type == "meta":
        return torch.empty(shape, device=device, dtype=dtype)
    record = _recording.get()
    if record is not None:
        record.add(fill, shape)
        return torch.zeros(shape, device=device, dtype=dtype)
    made = _empty(shape)
    fill(made)
    if through is not None:
        made = made.to(through)
    return made.to(device, dtype)


def skip(fill: Fill, device: torch.device, *shapes: Sequence[int]) -> None:
    """Draws random numbers and drops them, to advance the generator as the original implementation does.

    Args:
        fill: fills a tensor in place.
        device: device of the layer; on the meta device nothing is drawn.
        *shapes: shapes of the tensors to fill, one after the other.
    """
    record = _recording.get()
    for shape in shapes if device.type != "meta" else ():
        if record is None:
            fill(_empty(shape))
        else:
            record.add(fill, shape)


def repeated(make: Callable[[], object]) -> None:
    """Records a function that draws by itself, such as the constructor of a module, where ``Draws`` are recorded."""
    record = _recording.get()
    assert record is not None
    record.steps.append(make)


_recording: ContextVar[Draws | None] = ContextVar("_recording", default=None)


class Draws:
    """Random draws of a new adapter in their order, which advance the generator without their values.

    Args:
        always: leave out what PEFT does not draw with ``low_cpu_mem_usage=True``.

    Attributes:
        steps: numbers of 32-bit words to skip, and functions that draw.
    """

    def __init__(self, *, always: bool) -> None:
        self.always = always
        self.steps: list[int | Callable[[], object]] = []
        self._known: dict[Hashable, list[int | Callable[[], object]]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager: records what functions of this module would draw inside; the tensors they make are zeros."""
        token = _recording.set(self)
        try:
            yield
        finally:
            _recording.reset(token)

    def add(self, fill: Fill, shape: Sequence[int]) -> None:
        """Records that a tensor of a shape is filled."""
        if not self.always or isinstance(fill, Always):
            words = _words(fill, math.prod(shape))
            self._append(partial(_fill_empty, fill, tuple(shape)) if words is None else words)

    def repeat(self, alike: Hashable, draw: Callable[[], object]) -> None:
        """Records what a function draws.

        Args:
            alike: functions with an equal key draw as much.
            draw: the function; called once for each key.
        """
        if alike not in self._known:
            part = Draws(always=self.always)
            # If an interruption left a recording without end, adapters made later would be zeros.
            with HeldInterrupts(), part.recording():
                draw()
            self._known[alike] = part.steps
        for step in self._known[alike]:
            self._append(step)

    def _append(self, step: int | Callable[[], object]) -> None:
        if isinstance(step, int) and self.steps and isinstance(self.steps[-1], int):
            self.steps[-1] += step
        else:
            self.steps.append(step)

    def start(self) -> Callable[[], None]:
        """Starts to advance the CPU generator in the background where that is possible; the result finishes it."""
        first = self.steps[0] if len(self.steps) == 1 else None
        return Advance(first).finish if isinstance(first, int) else self.make

    def make(self) -> None:
        """Advances the generator."""
        for step in self.steps:
            if isinstance(step, int):
                skip_words(step)
            else:
                step()


def _fill_empty(fill: Fill, shape: Sequence[int]) -> None:
    fill(_empty(shape))


def _words(fill: Any, count: int) -> int | None:
    """How many 32-bit words of the CPU generator a fill of so many float32 takes; None if it is not known."""
    if torch.get_default_dtype() != torch.float32 or torch.get_default_device().type not in ("cpu", "meta"):
        return None
    while isinstance(fill, Always | partial):
        fill = fill.fill if isinstance(fill, Always) else fill.func
    if fill in (linear_, uniform_, Tensor.uniform_, nn.init.kaiming_uniform_):
        return count
    return count + (_BLOCK if count % _BLOCK else 0) if fill is normal_ and count >= _BLOCK else None


def skip_linear(device: torch.device, *shapes: Sequence[int]) -> None:
    """Draws and drops what new linear layers and convolutions draw for their weights and biases; see ``skip``."""
    skip(Tensor.uniform_, device, (sum(map(math.prod, shapes)),))


def dtype_in_layer(base: BaseLayer) -> torch.dtype | None:
    """The dtype to which PEFT casts new modules on a layer, for ``through`` of ``drawn``; None if it does not cast."""
    weight = base.module._parameters.get("weight")
    if weight is not None and weight.is_floating_point():
        return weight.dtype
    # An integer weight has a dtype to compute in only if its layer has a `compute_dtype`.
    return base.dtype if weight is None or "compute_dtype" in base.module.__dict__ else None


def _empty(shape: Sequence[int]) -> Tensor:
    made = torch.empty(shape)
    # Inside `torch.device("meta")` too, a layer with real values gets an adapter with real values.
    return torch.empty(shape, device="cpu") if made.is_meta else made
