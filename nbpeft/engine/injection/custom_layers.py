"""Layers of a user's own class, registered with PEFT's ``_register_custom_module``.

The class applies the adapters itself, in its own ``forward``. It has the interface of PEFT's layers: mappings by
adapter name (``adapter_layer_names`` lists those with parameters), ``active_adapters``, ``disable_adapters`` and
``merge``.

    CustomLayer     the module in the tree: an adapted layer for the manager, the user's layer for everything else
    CustomAdapter   the entries of one adapter in the mappings of the user's layer
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.active_state import ActiveState
from nbpeft.engine.changes.spill_file import SpillFile
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.layers_config import LayerByLayer
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, HotSwaps, Rescales
from nbpeft.engine.contract.base import Backend, BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.registry import resolve_backend, resolve_layer_kind
from nbpeft.engine.kernels.storage import StoredWeight
from nbpeft.engine.wrappers.layer import AdaptedLayer, WeightBackup
from nbpeft.errors import ConfigError, LayerKindError, MergeError, NotSupportedError

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CustomPart:
    """What is needed to create an adapter on a custom layer.

    Attributes:
        config: config of the adapter.
        layer_class: the user's class.
    """

    config: LayerByLayer
    layer_class: type[nn.Module]

    def make(self, module: nn.Module, path: str, name: str) -> CustomAdapter:
        """Creates a custom layer around a frozen layer, for one adapter.

        Args:
            module: the frozen layer.
            path: path of the layer.
            name: name of the adapter.

        Returns:
            The adapter, with the custom layer as its ``owner``.

        Raises:
            LayerKindError: the custom layer does not have the frozen one as its ``base_layer``.
        """
        adapter = CustomAdapter(self.config.make_custom_layer(self.layer_class, module, path, name), name)
        if adapter.owner._modules.get("base_layer") is not module:
            raise LayerKindError(
                f"{path}: {self.layer_class.__name__} must keep the frozen layer as its base_layer", path=path
            )
        return adapter


def custom_part(module: nn.Module, wrapper: nn.Module | None, config: Any, path: str) -> CustomPart | None:
    """Decides whether a layer gets, or has, a custom class.

    Args:
        module: the frozen layer.
        wrapper: its present wrapper, or None.
        config: config of the new adapter.
        path: path of the layer.

    Returns:
        The custom class and the config; None for an ordinary layer.

    Raises:
        LayerKindError: the layer has adapters already that cannot be combined with this class.
        ConfigError: the layer has a custom class, and the method of the config does not support any.
    """
    if not isinstance(config, LayerByLayer):
        if isinstance(wrapper, CustomLayer):
            title = type(wrapper.custom).__name__
            raise ConfigError(f"{path} is a {title}, which does not support {type(config).__name__}: exclude it")
        return None
    wanted = config.custom_layer_class(module)
    if isinstance(wrapper, CustomLayer):
        present = type(wrapper.custom)
        # Compared by name, because running a notebook cell again defines its class anew.
        if wanted is not None and _title(wanted) != _title(present):
            raise LayerKindError(
                f"{path} already has adapters in a {present.__name__}: it cannot become a {wanted.__name__}", path=path
            )
        return CustomPart(config, present)
    if wanted is not None and isinstance(wrapper, AdaptedLayer):
        raise LayerKindError(
            f"{path} already has adapters and cannot become a {wanted.__name__}: delete them first", path=path
        )
    return None if wanted is None else CustomPart(config, wanted)


def _title(layer_class: type) -> tuple[str, str]:
    return layer_class.__module__, layer_class.__qualname__


def probed_shapes(part: CustomPart, module: nn.Module, path: str) -> Shapes:
    """Finds the shapes of an adapter by creating one; the state of the CPU's random generator is restored.

    Args:
        part: the custom class and the config.
        module: the frozen layer.
        path: path of the layer.

    Returns:
        Parameter name -> shape.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = part.make(module, path, "default")
    return {name: tuple(tensor.shape) for name, tensor in made.tensors().items()}


class OpaqueKind:
    """The kind of a custom layer around a module that no other kind supports; it can only be called."""

    name = "custom"
    peft_name = ""
    is_linear = False
    takes_ids = False

    def matches(self, module: nn.Module) -> bool:
        """Never: only a registered custom class adapts such a layer."""
        return False

    def features(self, module: nn.Module) -> tuple[int, int]:
        """``in_features`` and ``out_features`` of the layer, or zeros."""
        found = [getattr(module, name, 0) for name in ("in_features", "out_features")]
        return (found[0], found[1]) if all(isinstance(count, int) for count in found) else (0, 0)

    def weight_shape(self, module: nn.Module) -> tuple[int, ...]:
        """Shape of ``weight``, or ()."""
        weight = getattr(module, "weight", None)
        return tuple(weight.shape) if isinstance(weight, Tensor) else ()

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight, unchanged."""
        return weight

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Always raises NotSupportedError."""
        raise NotSupportedError(f"the weight of a {type(module).__name__} can only be applied by its forward()")

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        """The vector, unchanged."""
        return vector


class OpaqueWeights(StoredWeight):
    """The backend of such a layer: all parameters and buffers, whatever their names."""

    name = "dense"

    def matches(self, module: nn.Module) -> bool:
        """Never; see ``OpaqueKind``."""
        return False

    def tensors(self, module: nn.Module) -> list[Tensor]:
        return [value.detach() for value in _values(module).values()] or [torch.empty(0)]

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Dtype of the first floating-point tensor, or torch's default."""
        floating = (tensor.dtype for tensor in self.tensors(module) if tensor.is_floating_point())
        return next(floating, torch.get_default_dtype())

    def dequantize(self, module: nn.Module) -> Tensor:
        """``weight``, detached; writing into it changes the module.

        Raises:
            NotSupportedError: the module has no ``weight``.
        """
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            raise NotSupportedError(f"a {type(module).__name__} has no single weight")
        return weight.detach()

    @torch.no_grad()
    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Copies ``weight`` into the module's."""
        self.dequantize(module).copy_(weight)

    def snapshot(self, module: nn.Module) -> dict[str, Tensor]:
        """Copies of all tensors on the CPU."""
        return {name: value.detach().to("cpu", copy=True) for name, value in _values(module).items()}

    @torch.no_grad()
    def restore(self, module: nn.Module, snapshot: Mapping[str, Tensor]) -> None:
        """Copies a snapshot back in place."""
        for name, value in _values(module).items():
            value.detach().copy_(snapshot[name])


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


_OPAQUE_KIND: LayerKind = OpaqueKind()
_OPAQUE_WEIGHTS: Backend = OpaqueWeights()


def kind_and_backend(module: nn.Module) -> tuple[LayerKind, Backend]:
    """The kind and backend of a frozen layer that gets a custom class; the opaque ones if no other fits."""
    kind, backend = resolve_layer_kind(module), resolve_backend(module)
    return (_OPAQUE_KIND, _OPAQUE_WEIGHTS) if kind is None or backend is None else (kind, backend)


class CustomAdapter(Adapter, Rescales, HotSwaps):
    """The entries of one adapter in the mappings of a custom layer.

    Args:
        owner: the custom layer.
        name: name of the adapter there.

    Attributes:
        entries: attribute of the custom layer -> its entry for the adapter.
    """

    def __init__(self, owner: Any, name: str) -> None:
        super().__init__()
        self.__dict__.update(owner=owner, name=name)
        self.__dict__["entries"] = {
            attribute: mapping[name] for attribute, mapping in mappings_of(owner).items() if name in mapping
        }
        for attribute in owner.adapter_layer_names:
            entry = self.entries.get(attribute)
            if isinstance(entry, nn.Module):
                self._modules[attribute] = entry
            elif isinstance(entry, nn.Parameter):
                self._parameters[attribute] = entry

    owner: Any
    name: str
    entries: dict[str, Any]

    @classmethod
    def create(cls, config: CustomPart, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Creates a custom layer and copies loaded tensors into it."""
        made: Any = config.make(site.base.module, site.path, site.name)
        for parameter in made.parameters():
            if parameter.dtype in _HALF:
                parameter.data = parameter.data.to(site.dtype)
        with torch.no_grad():
            for name, tensor in (tensors or {}).items():
                made.tensors()[name].copy_(tensor)
        return made

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """Always raises ConfigError: the shapes are only known once a custom layer is created."""
        raise ConfigError(f"{path} is a custom layer: load the adapter instead of hot-swapping it", path=path)

    @property
    def scaling(self) -> float:  # type: ignore[override]
        """The custom layer's scaling of the adapter; 1 if it has none."""
        return float(getattr(self.owner, "scaling", {}).get(self.name, 1.0))

    def rescale(self, scaling: float | Tensor, *, trained: bool = False) -> None:
        self.__dict__["_trained_scaling"] = None if trained else self.trained_scaling
        self.owner.scaling[self.name] = self.entries["scaling"] = float(scaling)

    def keep_scaling(self, change: Transaction) -> None:
        change.keep(self.owner.scaling)

    def store_scaling_as_tensor(self, device: torch.device) -> None:
        """Does nothing: custom layers have a number."""

    def tensors(self) -> dict[str, Tensor]:
        """Name in PEFT's files -> tensor."""
        return dict(self.state_dict(keep_vars=True))

    def saved_tensors(self, shapes: Any) -> dict[str, Tensor]:
        return self.tensors()

    def swap_refusal(self) -> str:
        return "is on a custom layer"

    @property
    def _class_name(self) -> str:
        return type(self.owner).__name__

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Always raises NotSupportedError: the custom layer applies all its active adapters at once."""
        raise NotSupportedError(f"a {self._class_name} applies all its active adapters at once")

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """The result of the custom layer's ``get_delta_weight``, in canonical layout.

        Raises:
            NotSupportedError: the custom layer has no ``get_delta_weight``.
        """
        if not hasattr(self.owner, "get_delta_weight"):
            raise NotSupportedError(f"a {self._class_name} has no get_delta_weight, so its delta weight is unknown")
        delta: Tensor = self.owner.get_delta_weight(self.name)
        return base.kind.canonical(base.module, delta.detach())


def mappings_of(owner: nn.Module) -> dict[str, Any]:
    """Attribute -> mapping of a custom layer that may have an entry for each adapter."""
    plain = {name: value for name, value in owner.__dict__.items() if type(value) is dict and not name.startswith("_")}
    modules = {name: value for name, value in owner._modules.items() if hasattr(value, "keys")}
    return plain | modules


class CustomLayer(AdaptedLayer):
    """An adapted layer whose output a user's class computes.

    It has the modules, parameters and attributes of the custom layer: ``state_dict()``, ``named_modules()``
    and ``isinstance`` give the same results as for that.

    Args:
        base_layer: the frozen layer.
        active_state: state of the model.

    Attributes:
        custom: the custom layer that was created for the first adapter; entries of later adapters are moved into it.
    """

    custom: Any = None

    def __init__(self, base_layer: nn.Module, active_state: ActiveState) -> None:
        super().__init__(base_layer, *kind_and_backend(base_layer), active_state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the custom layer, which applies the adapters that are active in this call.

        Raises:
            NotSupportedError: the call needs a scale or a mixed batch, which custom layers do not support.
        """
        self.show_adapters()
        active, here = self.active_state.current(), self.adapters._modules
        if active.rows is not None:
            if any(name in here for name in active.rows.names):
                raise NotSupportedError(
                    f"a {self._get_name()} does not support adapter_names: it applies the same adapters to all rows"
                )
            return self.base_layer(*args, **kwargs)
        if any(scale != 1.0 for name, scale in zip(active.names, active.scales, strict=True) if name in here):
            raise NotSupportedError(f"a {self._get_name()} does not support scales: set the scale to 1")
        return self.custom(*args, **kwargs)

    def attach(self, modules: dict[str, nn.Module | None], attribute: str, change: Transaction) -> None:
        super().attach(modules, attribute, change)
        self.show_adapters()

    # Mappings of the custom layer

    def show_adapters(self) -> None:
        """Updates the mappings of the custom layer to the present adapters."""
        now: dict[str, Any] = self.adapters._modules
        if self._shown == now:
            return
        if self.custom is None:
            self._adopt(next(iter(now.values())))
        for attribute, mapping in mappings_of(self.custom).items():
            for name, adapter in self._shown.items():
                # The custom layer's own methods may have replaced entries since the last update.
                adapter.entries.update({attribute: mapping[name]} if name in mapping else {})
            entries = {name: value for name, value in mapping.items() if name not in self._shown}
            own_entries = ((name, adapter.entries) for name, adapter in now.items())
            entries.update({name: own[attribute] for name, own in own_entries if attribute in own})
            _fill(mapping, entries)
        for name, adapter in now.items():
            adapter.__dict__.update(owner=self.custom, name=name)
        self.__dict__["_shown"] = dict(now)

    def _adopt(self, adapter: Any) -> None:
        custom = adapter.owner
        # The same dictionaries, so that both objects always have the same submodules, parameters and buffers.
        own = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
        self.__dict__.update({name: custom.__dict__[name] for name in own}, custom=custom)
        custom.__dict__.update(adapted_layer=self, training=self.training)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        self.show_adapters()
        return nn.Module.named_children(self)

    def called_children(self) -> Any:
        """Children of the custom layer, and the adapters, whose modules are inside those children."""
        return *(child for _, child in self.named_children()), self.adapters

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.custom is not None:
            self.custom.training = mode
        return self

    def _replicate_for_data_parallel(self) -> Any:
        raise NotSupportedError(f"nn.DataParallel cannot replicate a {self._get_name()}: use DistributedDataParallel")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "adapters" not in self.__dict__:
            return nn.Module.__getattr__(self, name)
        if name == "base_layer":
            return self.__dict__["_modules"][name]
        self.show_adapters()
        if self.custom is None and name.startswith("_"):
            return nn.Module.__getattr__(self, name)
        return getattr(self.base_layer if self.custom is None else self.custom, name)

    # Attributes of the custom layer

    @property
    def scaling(self) -> Any:
        """``scaling`` of the custom layer."""
        self.show_adapters()
        return self.custom.scaling

    @scaling.setter
    def scaling(self, values: Mapping[str, Any]) -> None:
        self.custom.scaling = {**self.custom.scaling, **values}  # a new mapping: a transaction may have kept the old

    def set_scale(self, adapter: str, scale: float) -> None:
        """Calls ``set_scale`` of the custom layer."""
        self.custom.set_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """Calls ``scale_layer`` of the custom layer."""
        self.custom.scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Calls ``unscale_layer`` of the custom layer."""
        self.custom.unscale_layer(scale)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Calls ``update_layer`` of the custom layer, for an adapter of the model.

        Raises:
            UnknownAdapterError: the model has no such adapter.
        """

        def make() -> CustomAdapter:
            self.custom.update_layer(adapter_name, *args, **kwargs)
            return CustomAdapter(self.custom, adapter_name)

        self._commands().replace(self, adapter_name, make, *mappings_of(self.custom).values())

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """``adapter_layer_names`` of the custom layer."""
        self.show_adapters()
        return tuple(self.custom.adapter_layer_names)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """``other_param_names`` of the custom layer."""
        self.show_adapters()
        return tuple(self.custom.other_param_names)

    @property
    def adapted_as(self) -> str:
        """Name of the custom layer's class in ``repr``."""
        self.show_adapters()
        return str(self.custom._get_name())

    # Merging

    def check_mergeable(self, names: Sequence[str]) -> None:
        if any(name in self.adapters._modules for name in names):
            if not callable(getattr(self.custom, "merge", None)):
                raise MergeError(f"a {self._get_name()} has no merge()")
            if any(tensor.is_meta for tensor in self.base_layer.parameters()):
                raise MergeError("its weight has no data (meta device): load the whole model")

    def not_finite_when_merged(self, names: Sequence[str], scales: Sequence[float]) -> str:
        """Checks the adapters' tensors only."""
        return "" if self.are_finite(names) else "weights"

    def _stored(self, *, untie: bool, spill: SpillFile | None = None) -> WeightBackup:
        if untie:
            raise MergeError(f"a {self._get_name()} shares its weight with another layer and cannot be merged alone")
        return WeightBackup(None, _OPAQUE_WEIGHTS.snapshot(self.base_layer), None, self.merged_names, self._frozen)

    def _restore(self, stored: WeightBackup) -> None:
        _OPAQUE_WEIGHTS.restore(self.base_layer, stored.weight)
        self.merged_names, self._frozen = stored.merged, stored.frozen
        self.custom.merged_adapters[:] = stored.merged

    def write_merged(self, chosen: Sequence[tuple[str, float]], module: nn.Module, bias: Tensor | None) -> None:
        """Calls ``merge`` of the custom layer."""
        scaled = next((name for name, scale in chosen if scale != 1.0), None)
        if scaled is not None:
            raise MergeError(f"a {self._get_name()} cannot merge with a scale: set the scale of {scaled!r} to 1")
        self.custom.merge(adapter_names=[name for name, _ in chosen])


def _fill(mapping: MutableMapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Replaces the entries of a dictionary, nn.ModuleDict or nn.ParameterDict in place."""
    for gone in [name for name in mapping if name not in entries]:
        del mapping[gone]
    for name, value in entries.items():
        mapping[name] = value
