"""The plan of a change: which modules get adapters and copies, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import (
    Adapter,
    AdapterConfig,
    AdapterWeights,
    TiedAdapter,
)
from nbpeft.engine.contract.base import Shapes
from nbpeft.engine.contract.registry import (
    method_of,
)
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.errors import CheckpointError


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter.

    Attributes:
        path: path of the target in the base model.
        kind: name of the layer kind.
        backend: name of the backend that stores the weight.
        in_features: number of input features.
        out_features: number of output features.
        shapes: parameter name -> shape, including parameters shared with another target.
        adapter_class: class of the adapter.
        config: config the adapter is created from: the plan's config, or that of a companion method.
        tied_to: path of the target whose tensors this one shares; otherwise empty.
        parameter: name of the adapted parameter, for ``target_parameters`` and composite modules; otherwise empty.
        matrix_count: number of matrices in that parameter (experts).
        tied: parameter name -> path of the earlier target that owns the parameter.
        fixed: name -> shape and dtype of tensors that are saved but not trained.
        unsaved: number of values that are neither trained nor saved.
    """

    path: str
    kind: str
    backend: str
    in_features: int
    out_features: int
    shapes: Shapes
    adapter_class: type[Adapter]
    config: Any
    tied_to: str = ""
    parameter: str = ""
    matrix_count: int = 1
    tied: Mapping[str, str] = field(default_factory=dict)
    fixed: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    unsaved: int = 0

    @property
    def module_path(self) -> str:
        """Path of the module that gets a wrapper."""
        return self.path.removesuffix(f".{self.parameter}") if self.parameter else self.path

    @property
    def is_bare(self) -> bool:
        """Whether the config names the parameter and not the module."""
        return self.path != self.module_path

    def adapted_in(self, module: nn.Module) -> nn.Module:
        """The module whose ``weight`` is adapted: ``module``, the one at ``module_path``, or a view of a parameter."""
        return ParameterView(module, self.parameter) if self.parameter else module

    @property
    def saved_shapes(self) -> Shapes:
        """Name -> shape of the saved tensors."""
        return self.shapes | {name: shape for name, (shape, _) in self.fixed.items()}

    @property
    def parameter_count(self) -> int:
        """Number of new trainable parameters, without those shared with another target."""
        others = (*self.adapter_class.frozen_parameters, *self.tied)
        own = {} if self.tied_to else self.shapes
        return sum(math.prod(shape) for name, shape in own.items() if name not in others)


@dataclass(frozen=True)
class Extent:
    """Size of some parameters of the base model.

    Attributes:
        count: number of parameters.
        byte_count: bytes, in the base model's dtype.
    """

    count: int = 0
    byte_count: int = 0

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> Extent:
        """The total size of some parameters."""
        sizes = [(parameter.numel(), parameter.numel() * parameter.element_size()) for parameter in parameters]
        return cls(sum(count for count, _ in sizes), sum(byte_count for _, byte_count in sizes))


@dataclass(frozen=True)
class InjectionPlan:
    """Everything that applying a config would change in a model.

    Attributes:
        method: label of the method.
        config: a copy of the config with its targets resolved.
        targets: the modules that get an adapter, in model order.
        copies: path of each module trained as a whole -> size of its copy; zero if it shares another one's tensors.
        biases: name of each base bias that is trained -> its size.
        excluded: paths that match the targets but are excluded by ``exclude_modules``.
        missing: targets that match nothing.
        shared: name -> shape of the tensors that all layers share; empty for most methods.
        features: path -> (in, out) features of the targets, in model order.
        other_paths: path of a module that gets a wrapper -> other paths of the same module.
    """

    method: str
    config: AdapterConfig
    targets: tuple[Target, ...]
    copies: dict[str, Extent]
    biases: dict[str, Extent]
    excluded: tuple[str, ...]
    missing: tuple[str, ...]
    shared: Shapes = field(default_factory=dict)
    features: dict[str, tuple[int, int]] = field(default_factory=dict)
    other_paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def module_paths(self) -> tuple[str, ...]:
        """Paths of the modules that get a wrapper, each once."""
        return tuple(dict.fromkeys((*(target.module_path for target in self.targets), *self.copies)))

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the targets."""
        return tuple(target.path for target in self.targets)

    def on_layers(self, paths: Collection[str]) -> InjectionPlan:
        """The plan limited to some of its layers; unchanged if the layers share tensors."""
        if self.shared or all(path in paths for path in self.paths):  # shared sizes depend on all layers
            return self
        targets = tuple(target for target in self.targets if target.path in paths)
        return replace(
            self, targets=targets, features={path: self.features[path] for path in self.features if path in paths}
        )

    @property
    def saved_shared(self) -> Shapes:
        """The shared tensors that are saved."""
        state = method_of(self.config).shares.state
        return self.shared if state is not None and state.is_saved(self.config) else {}

    @property
    def parameter_count(self) -> int:
        """Number of trainable parameters: of adapters, shared tensors, copies and biases."""
        return self._added_count + sum(extent.count for extent in self._of_base)

    @property
    def _of_base(self) -> list[Extent]:
        """Sizes of the copies and the biases."""
        return [*self.copies.values(), *self.biases.values()]

    @property
    def _added_count(self) -> int:
        """Number of trainable parameters that the base model does not have."""
        state = method_of(self.config).shares.state
        trained = self.shared.values() if state is not None and state.is_trained else ()
        return sum(target.parameter_count for target in self.targets) + sum(map(math.prod, trained))

    def not_tied_in(self, weights: AdapterWeights) -> list[Target]:
        """The targets that should share another target's tensors but differ from it in a loaded file."""
        given = weights.adapters
        return [
            target
            for target in self.targets
            if target.tied_to
            and issubclass(target.adapter_class, TiedAdapter)
            and target.adapter_class.differs(given.get(target.path, {}), given.get(target.tied_to, {}))
        ]

    def share_in(self, weights: AdapterWeights) -> None:
        """Adds loaded shared tensors (``tied``) to the targets that own them; files may name them elsewhere only.

        Args:
            weights: loaded tensors; changed in place.

        Raises:
            CheckpointError: the file has different values for one shared tensor.
        """
        for target in self.targets:
            loaded = weights.adapters.get(target.path, {})
            for name, owner in ((name, owner) for name, owner in target.tied.items() if name in loaded):
                shared = weights.adapters.setdefault(owner, {}).setdefault(name, loaded[name])
                if not torch.equal(loaded[name].to(shared), shared):
                    raise CheckpointError(
                        f"the file has different {name} for {target.path} and {owner}, which share it ({self.method})"
                    )

    @property
    def byte_count(self) -> int:
        """Bytes of the trainable parameters; those of adapters are float32."""
        return self._added_count * torch.float32.itemsize + sum(extent.byte_count for extent in self._of_base)

    @property
    def frozen_byte_count(self) -> int:
        """Bytes of shared tensors that are not trained, such as random projections."""
        state = method_of(self.config).shares.state
        if state is None or state.is_trained:
            return 0
        others = state.other_dtypes(self.shared)
        sizes = {name: others.get(name, torch.float32).itemsize for name in self.shared}
        return sum(math.prod(shape) * sizes[name] for name, shape in self.shared.items())
