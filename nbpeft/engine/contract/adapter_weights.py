"""The tensors of one adapter, apart from where they hang and from any file format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
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

    @torch.inference_mode(False)
    @torch.no_grad()
    def copied(self, device: str | None = None) -> AdapterWeights:
        """Returns copies of all tensors, without history, that nothing else writes to.

        A tensor that stands in several places of ``adapters`` stays one.

        Args:
            device: where to; None: each stays where it is.
        """
        copies = {id(value): _copied(value, device) for named in self.adapters.values() for value in named.values()}
        return AdapterWeights(
            {path: {key: copies[id(value)] for key, value in named.items()} for path, named in self.adapters.items()},
            {path: _all_copied(named, device) for path, named in self.copies.items()},
            base=_all_copied(self.base, device),
            shared=_all_copied(self.shared, device),
            parameters=self.parameters,
            starts={
                path: replace(start, down=_copied(start.down, device), neg_up=_copied(start.neg_up, device))
                for path, start in self.starts.items()
            },
        )

    @property
    def tensors(self) -> dict[tuple[str, str, str], Tensor]:
        """All tensors but those of the starts: (group, path, name) -> tensor."""
        groups = {"adapters": self.adapters, "copies": self.copies, "": {"base": self.base, "shared": self.shared}}
        return {
            (group, path, key): tensor
            for group, paths in groups.items()
            for path, named in paths.items()
            for key, tensor in named.items()
        }

    @property
    def byte_count(self) -> int:
        """Bytes of the tensors, each counted once."""
        return sum({id(tensor): tensor.nbytes for tensor in self.tensors.values()}.values())

    def equals(self, other: AdapterWeights) -> bool:
        """Whether both have the same tensors, bit for bit, wherever they are."""
        found, wanted = self.tensors, other.tensors
        return found.keys() == wanted.keys() and all(torch.equal(found[key].cpu(), wanted[key].cpu()) for key in wanted)


def _all_copied(tensors: Mapping[str, Tensor], device: str | None) -> dict[str, Tensor]:
    return {key: _copied(value, device) for key, value in tensors.items()}


def _copied(tensor: Tensor, device: str | None) -> Tensor:
    return tensor.detach().to(device or tensor.device, copy=True)


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
