"""The tensors of one adapter, independent of the model that they are on and of any file format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

ReadsTensors = Callable[[Mapping[str, Mapping[str, tuple[int, ...]]]], Mapping[str, Mapping[str, Tensor]]]
"""Reads a file: given path of a layer -> parameter -> shape, returns the same mapping with tensors as values."""


@dataclass(frozen=True)
class InitialComponent:
    """The part of a layer's weight that an adapter is initialized from: ``-scaling * neg_up @ down``.

    ``scaling`` is that of the adapter, which subtracts this part from the frozen weight.

    Attributes:
        down: (r, in).
        neg_up: (out, r); the negative of the second factor.
        init: how it was computed, as in ``init_lora_weights`` of the config.
        names: names of the two parameters that are initialized with the factors.
    """

    down: Tensor
    neg_up: Tensor
    init: str
    names: tuple[str, str]

    def is_start_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether an adapter's product is nearer to this one than to zero, as after training from this start.

        Args:
            tensors: parameter name -> tensor of the adapter.
        """
        # With P the product of the adapter and S that of the start: |P - S| < |P| if and only if 2 <P, S> > |S|^2.
        # All products here are (r, r), so that no tensor of the weight's size is made.
        down, up = (tensors[name].to(own) for name, own in zip(self.names, (self.down, self.neg_up), strict=True))
        common = ((up.mT @ self.neg_up) * (down @ self.down.mT)).sum()
        return bool(-2 * common > ((self.neg_up.mT @ self.neg_up) * (self.down @ self.down.mT)).sum())


@dataclass
class AdapterWeights:
    """The tensors of one adapter, independent of any file format.

    Attributes:
        adapters: path of the adapted module -> parameter name -> tensor.
        copies: path of a module trained as a whole (``modules_to_save``) -> name of a parameter or
            buffer inside that module -> tensor.
        base: name of a trained base parameter (``bias="all"``), as in the model without adapters -> tensor.
        shared: name of a tensor that all layers of the adapter share -> tensor.
        parameters: the paths in ``adapters`` that are those of parameters and not of modules (``target_parameters``);
            parameters of the same module are in that module's order.
        starts: path -> the part of the weight that the adapter is initialized from there; it is not saved to a file.
    """

    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    parameters: Collection[str] = ()
    starts: dict[str, InitialComponent] = field(default_factory=dict)

    @torch.inference_mode(False)
    @torch.no_grad()
    def copied(self, device: str | None = None) -> AdapterWeights:
        """Copies all tensors, detached; the copies share no memory with the originals.

        A tensor that appears several times in ``adapters`` is copied once.

        Args:
            device: device of the copies; None for the device of each original.

        Returns:
            The copies.
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
        """(group, path, name) -> tensor; those of ``starts`` are left out."""
        groups = {"adapters": self.adapters, "copies": self.copies, "": {"base": self.base, "shared": self.shared}}
        return {
            (group, path, key): tensor
            for group, paths in groups.items()
            for path, named in paths.items()
            for key, tensor in named.items()
        }

    @property
    def byte_count(self) -> int:
        """Bytes of all tensors except those of ``starts``; a shared tensor is counted once."""
        return sum({id(tensor): tensor.nbytes for tensor in self.tensors.values()}.values())

    def equals(self, other: AdapterWeights) -> bool:
        """Whether both have the same tensors with equal values; devices may differ."""
        own, others = self.tensors, other.tensors
        return own.keys() == others.keys() and all(torch.equal(own[key].cpu(), others[key].cpu()) for key in others)


def _all_copied(tensors: Mapping[str, Tensor], device: str | None) -> dict[str, Tensor]:
    return {key: _copied(value, device) for key, value in tensors.items()}


def _copied(tensor: Tensor, device: str | None) -> Tensor:
    # A tensor on the meta device has nothing to copy.
    return tensor.detach().to(tensor.device if device is None or tensor.is_meta else device, copy=True)


@dataclass(frozen=True)
class LowRankDelta:
    """What an adapter adds to one layer: ``scaling * up @ down`` to the weight, and a bias.

    Attributes:
        down: (r, in), for a convolution (r, in, *kernel).
        up: (out, r), for a convolution (out, r, 1, …).
        scaling: factor on the product.
        bias: (out,), added to the layer's bias without ``scaling``; None if there is none.
    """

    down: Tensor
    up: Tensor
    scaling: float
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank r: the number of rows of ``down``."""
        return int(self.down.shape[0])
