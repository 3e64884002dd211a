"""What the layers of one adapter share: a common projection, a bank of vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.bindable import Bindable
from nbpeft.engine.contract.initial_draws import Fill, drawn


@dataclass(frozen=True)
class SharedSite:
    """Where a shared state is built.

    Attributes:
        shapes: what ``tensor_shapes`` gave.
        device: where the first layer is.
        dtype: dtype of new tensors.
    """

    shapes: Mapping[str, tuple[int, ...]]
    device: torch.device
    dtype: torch.dtype

    def new(self, shape: Sequence[int], fill: Fill | None = None) -> Tensor:
        """A new tensor; see ``AdapterSite.new``."""
        if fill is None:
            return torch.zeros(shape, device=self.device, dtype=self.dtype)
        return drawn(shape, fill, self.device, self.dtype)


class SharedState(Bindable):
    """What all layers of one adapter share; one for each adapter name. Derive from it where a method needs one.

    It hangs in the first adapted layer, so it moves and trains with the model.
    """

    made_from: ClassVar[tuple[str, ...]] = ()
    """Fields that say, with its shapes, what ``create`` makes where no file holds it."""

    is_trained: ClassVar[bool] = True
    """Whether its tensors are trained, or else frozen."""

    named_first: ClassVar[tuple[str, ...]] = ()
    """Of its modules, which give tensors by name, those of which PEFT has these by name first and then by adapter."""

    @classmethod
    def tensor_shapes(cls, config: Any, features: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of its tensors.

        Args:
            config: the method's own config.
            features: path -> (in, out) features of each layer that gets an adapter, in the order of the model.

        Raises:
            ConfigError: the layers cannot share a state.
        """
        raise NotImplementedError

    @classmethod
    def initial_tensors(cls, config: Any, site: SharedSite) -> Mapping[str, Tensor]:
        """Makes the tensors of a new state, by name; zeros unless a method says otherwise.

        Args:
            config: the method's own config.
            site: shapes, device and dtype; ``site.new`` makes tensors.
        """
        return {name: site.new(shape) for name, shape in site.shapes.items()}

    @classmethod
    def create(cls, config: Any, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Builds the state, before the adapters of the layers; by default all its tensors are parameters.

        Args:
            config: the method's own config.
            site: shapes, device and dtype.
            tensors: loaded tensors by name, or None to initialise.
        """
        given = cls.initial_tensors(config, site) if tensors is None else tensors
        made = cls()
        made.bind({name: given[name].to(site.device, site.dtype) for name in site.shapes})
        return made

    @classmethod
    def other_dtypes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.dtype]:
        """Name -> dtype of those of its tensors that hold no floating numbers, such as places.

        Args:
            shapes: what ``tensor_shapes`` gave.
        """
        return {}

    def place(self, layers: Mapping[str, BaseLayer]) -> None:
        """Tells it, once it is built and before the adapters are, which layers share it; most do not ask.

        What depends on their weights and is in no file is made here.

        Args:
            layers: path -> layer, in the order of the model.
        """

    def settle(self, layers: Mapping[str, tuple[nn.Module, BaseLayer]], change: Transaction) -> None:
        """Called when its tensors were overwritten: what adapters keep that follows from them is computed again.

        Args:
            layers: path -> adapter and layer.
            change: records what is written.
        """

    @classmethod
    def is_saved(cls, config: Any) -> bool:
        """Whether a file holds its tensors; otherwise ``create`` makes the same ones again from the config."""
        return True

    def saved_tensors(self) -> dict[str, Tensor]:
        """What an adapter's file holds of it, by name; references."""
        return dict(self.state_dict(keep_vars=True))


class DrawnTensors(SharedState):
    """Frozen tensors that are drawn from a seed (``projection_prng_key``) and saved if ``save_projection`` asks for it.

    A subclass gives ``names``, ``tensor_shapes`` and ``drawn``.
    """

    made_from: ClassVar[tuple[str, ...]] = ("r", "projection_prng_key", "save_projection")
    is_trained: ClassVar[bool] = False
    names: ClassVar[tuple[str, str]]

    def __init__(self, tensors: Mapping[str, Tensor], *, saved: bool) -> None:
        super().__init__()
        for name in self.names:
            self.register_buffer(name, tensors[name], persistent=saved)

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Both, in the order of their names."""
        first, second = (self.get_buffer(name) for name in self.names)
        return first, second

    @classmethod
    def drawn(
        cls, config: Any, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Draws the tensors, by name, on the CPU, as PEFT does."""
        raise NotImplementedError

    @classmethod
    def create(cls, config: Any, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded tensors or draws them from the config's seed."""
        if tensors is None:
            tensors = cls.drawn(config, site.shapes, torch.Generator().manual_seed(config.projection_prng_key))
        placed = {name: tensor.to(site.device, site.dtype) for name, tensor in tensors.items()}
        return cls(placed, saved=config.save_projection)

    @classmethod
    def is_saved(cls, config: Any) -> bool:
        """Whether the config asks for it."""
        return bool(config.save_projection)


class Together(SharedState):
    """Knows the adapters of all layers, for what is computed over all of them.

    Args:
        config: of the adapter.

    Attributes:
        adapters: path -> the adapter of a layer.
    """

    adapters: dict[str, Any]
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        # Each adapter is a module of its layer.
        self.bind(config=config, adapters={})

    @classmethod
    def tensor_shapes(cls, config: Any, features: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """It has no tensors."""
        return {}

    @classmethod
    def create(cls, config: Any, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Starts without any adapter."""
        return cls(config)

    @classmethod
    def is_saved(cls, config: Any) -> bool:
        """A file holds nothing of it."""
        return False
