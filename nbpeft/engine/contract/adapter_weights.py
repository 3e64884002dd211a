"""The tensors of one adapter, apart from where they hang and from any file format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

ReadsTensors = Callable[[Mapping[str, Mapping[str, tuple[int, ...]]]], Mapping[str, Mapping[str, Tensor]]]
"""Path of a layer -> parameter -> shape, of an adapter on a model: the same with the tensors of its file."""


@dataclass(frozen=True)
class TakenOver:
    """The part of a layer's weight that an adapter starts in: ``-scaling * neg_up @ down``, with its own scaling.

    Attributes:
        down: (r, in).
        neg_up: (out, r).
        init: what found it, as in the adapter's config.
        names: of the two parameters that start there.
    """

    down: Tensor
    neg_up: Tensor
    init: str
    names: tuple[str, str]

    def is_start_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether parameters are nearer to these factors than to zero, as after a training that started here."""
        down, up = (tensors[name].to(own) for name, own in zip(self.names, (self.down, self.neg_up), strict=True))
        common = ((up.mT @ self.neg_up) * (down @ self.down.mT)).sum()
        return bool(-2 * common > ((self.neg_up.mT @ self.neg_up) * (self.down @ self.down.mT)).sum())


@dataclass
class AdapterWeights:
    """The tensors of one adapter, apart from any file format.

    Attributes:
        adapters: path of the adapted module -> parameter name -> tensor.
        copies: path of a module trained as a whole (``modules_to_save``) -> parameter or
            buffer name inside that module -> tensor.
        base: name of a trained base parameter (``bias="all"``), without any wrapper -> tensor.
        shared: name of a tensor that all layers of the adapter share -> tensor.
        parameters: those of the paths in ``adapters`` that are parameters, those of one module in its own order.
        starts: path -> the part of the weight that the adapter takes over there, which no file holds.
    """

    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    parameters: Collection[str] = ()
    starts: dict[str, TakenOver] = field(default_factory=dict)


@dataclass(frozen=True)
class LowRankDelta:
    """What an adapter adds to one layer: ``scaling * up @ down`` to the weight, and a bias.

    Attributes:
        down: (r, in), for a convolution (r, in, *kernel).
        up: (out, r), for a convolution (out, r, 1, …).
        scaling: factor on the product.
        bias: (out,), added to the layer's bias as it is; None where there is none.
    """

    down: Tensor
    up: Tensor
    scaling: float
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return int(self.down.shape[0])
