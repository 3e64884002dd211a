"""State that the layers of one adapter share: a common projection, a bank of vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.base import BaseLayer, Shape, Shapes
from nbpeft.engine.contract.bindable import Bindable
from nbpeft.engine.contract.initial_draws import Fill, drawn


@dataclass(frozen=True)
class SharedSite:
    """What a shared state is built from.

    Attributes:
        shapes: name -> shape, as ``tensor_shapes`` returned.
        device: device of the first adapted layer.
        dtype: dtype of new tensors.
    """

    shapes: Mapping[str, Shape]
    device: torch.device
    dtype: torch.dtype

    def new(self, shape: Sequence[int], fill: Fill | None = None) -> Tensor:
        """A new tensor; see ``AdapterSite.new``."""
        if fill is None:
            return torch.zeros(shape, device=self.device, dtype=self.dtype)
        return drawn(shape, fill, self.device, self.dtype)


class SharedState(Bindable):
    """State that all layers of one adapter share, one object per adapter name. A method with such state subclasses it.

    It is registered as a submodule of the first adapted layer, so that it is moved and trained with the model.
    """

    made_from: ClassVar[tuple[str, ...]] = ()
    """Fields of the config that, together with the shapes, determine a state that is not loaded from a file."""

    is_trained: ClassVar[bool] = True
    """Whether its tensors are trained; otherwise they are frozen."""

    in_layers: ClassVar[bool] = False
    """Whether PEFT's state dicts contain its tensors in each adapted layer, and once more in ``base_model``."""

    @classmethod
    def tensor_shapes(cls, config: Any, features: Mapping[str, tuple[int, int]]) -> Shapes:
        """The names and shapes of its tensors.

        Args:
            config: the method's own config.
            features: path -> (in, out) features of each layer that gets an adapter, in the order of the model.

        Returns:
            Name -> shape.

        Raises:
            ConfigError: layers of these sizes cannot share a state.
        """
        raise NotImplementedError

    @classmethod
    def initial_tensors(cls, config: Any, site: SharedSite) -> Mapping[str, Tensor]:
        """Creates the tensors of a new state; by default all are zeros.

        Args:
            config: the method's own config.
            site: shapes, device and dtype; ``site.new`` makes tensors.

        Returns:
            Name -> tensor.
        """
        return {name: site.new(shape) for name, shape in site.shapes.items()}

    @classmethod
    def create(cls, config: Any, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Builds the state, before the adapters of the layers; by default all its tensors are parameters.

        Args:
            config: the method's own config.
            site: shapes, device and dtype.
            tensors: name -> loaded tensor, or None to initialize new ones.

        Returns:
            The state.
        """
        given = cls.initial_tensors(config, site) if tensors is None else tensors
        made = cls()
        made.bind({name: given[name].to(site.device, site.dtype) for name in site.shapes})
        return made

    @classmethod
    def other_dtypes(cls, shapes: Mapping[str, Shape]) -> dict[str, torch.dtype]:
        """The dtypes of tensors that are not floating-point, such as indices.

        Args:
            shapes: name -> shape, as ``tensor_shapes`` returned.

        Returns:
            Name -> dtype; floating-point tensors are left out.
        """
        return {}

    def place(self, layers: Mapping[str, BaseLayer]) -> None:
        """Called after the state was built and before the adapters are; most methods do not need it.

        Override it to compute what depends on the weights of the layers and is not saved.

        Args:
            layers: path -> layer, in the order of the model.
        """

    def recompute_derived(self, layers: Mapping[str, tuple[nn.Module, BaseLayer]], change: Transaction) -> None:
        """Called after its tensors were overwritten, to update values in adapters that were computed from them.

        Args:
            layers: path -> adapter and layer.
            change: records what is written, so that a failure can undo it.
        """

    @classmethod
    def is_saved(cls, config: Any) -> bool:
        """Whether its tensors are saved; otherwise ``create`` must reproduce them from the config."""
        return True

    def saved_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor to save; the tensors themselves, not copies."""
        return dict(self.state_dict(keep_vars=True))


class DrawnTensors(SharedState):
    """Frozen tensors that are drawn from a seed (``projection_prng_key``), and saved only with ``save_projection``.

    A subclass implements ``names``, ``tensor_shapes`` and ``drawn``.
    """

    made_from: ClassVar[tuple[str, ...]] = ("r", "projection_prng_key", "save_projection")
    is_trained: ClassVar[bool] = False
    in_layers: ClassVar[bool] = True
    names: ClassVar[tuple[str, str]]

    def __init__(self, tensors: Mapping[str, Tensor], *, saved: bool) -> None:
        super().__init__()
        for name in self.names:
            self.register_buffer(name, tensors[name], persistent=saved)

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Both tensors, in the order of ``names``."""
        first, second = (self.get_buffer(name) for name in self.names)
        return first, second

    @classmethod
    def drawn(cls, config: Any, shapes: Mapping[str, Shape], generator: torch.Generator) -> Mapping[str, Tensor]:
        """Draws the tensors on the CPU, with the same numbers as PEFT.

        Args:
            config: the method's own config.
            shapes: name -> shape, as ``tensor_shapes`` returned.
            generator: seeded with ``projection_prng_key``.

        Returns:
            Name -> tensor.
        """
        raise NotImplementedError

    @classmethod
    def create(cls, config: Any, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        if tensors is None:
            tensors = cls.drawn(config, site.shapes, torch.Generator().manual_seed(config.projection_prng_key))
        placed = {name: tensor.to(site.device, site.dtype) for name, tensor in tensors.items()}
        return cls(placed, saved=config.save_projection)

    @classmethod
    def is_saved(cls, config: Any) -> bool:
        """``save_projection`` of the config."""
        return bool(config.save_projection)


class Together(SharedState):
    """A shared state without tensors that refers to the adapters of all layers, to compute over all of them.

    Args:
        config: config of the adapter.

    Attributes:
        adapters: path -> the adapter of a layer.
    """

    adapters: dict[str, Any]
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        # Plain attributes: each adapter is a submodule of its layer already.
        self.bind(config=config, adapters={})

    @classmethod
    def tensor_shapes(cls, config: Any, features: Mapping[str, tuple[int, int]]) -> Shapes:
        """None: it has no tensors."""
        return {}

    @classmethod
    def create(cls, config: Any, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """A state without adapters yet."""
        return cls(config)

    @classmethod
    def is_saved(cls, config: Any) -> bool:
        """False: there is nothing to save."""
        return False


def state_of_all(adapter: nn.Module) -> SharedState | None:
    """Returns the state that an adapter shares with those of other layers, if PEFT lists its tensors in each layer.

    Args:
        adapter: the adapter of a layer.
    """
    for state in (adapter._modules.get("shared"), *vars(adapter).values()):
        if isinstance(state, SharedState) and state.in_layers:  # no generator: this runs for all adapters of all layers
            return state
    return None


def listed_name(key: str, adapter: str) -> str:
    """Returns the name in PEFT's modules of a tensor in a shared state.

    Args:
        key: its name in the state.
        adapter: name of the adapter.
    """
    name, _, rest = key.partition(".")
    return ".".join(filter(None, (name, adapter, rest)))


def add_shared(adapters: Mapping[str, nn.Module], found: dict[str, Any], prefix: str, *, keep_vars: bool) -> None:
    """Adds tensors of shared states to a state dict, under PEFT's names, if they are not in it.

    Args:
        adapters: adapter name -> adapter.
        found: the state dict, changed in place.
        prefix: prefix of the names.
        keep_vars: add the parameters themselves, not detached.
    """
    for name, adapter in adapters.items():
        state = state_of_all(adapter)
        for key, tensor in {} if state is None else state.state_dict(keep_vars=keep_vars).items():
            found.setdefault(prefix + listed_name(key, name), tensor)


@torch.no_grad()
def take_shared(
    adapters: Mapping[str, nn.Module], state_dict: dict[str, Any], prefix: str, missing: list[str], errors: list[str]
) -> None:
    """Loads what ``add_shared`` added, and removes it from the state dict.

    Args:
        adapters: adapter name -> adapter.
        state_dict: changed in place.
        prefix: prefix of the names.
        missing: names that are not in the state dict are appended.
        errors: messages about tensors of another shape are appended.
    """
    for name, adapter in adapters.items():
        state = state_of_all(adapter)
        for key, tensor in {} if state is None else state.state_dict().items():
            listed = prefix + listed_name(key, name)
            given = state_dict.pop(listed, None)
            if given is None:
                missing.append(listed)
            elif given.shape != tensor.shape:
                errors.append(f"size mismatch for {listed}: {tuple(given.shape)} instead of {tuple(tensor.shape)}")
            else:
                tensor.copy_(given)
