"""PEFT's status records of layers and models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nbpeft.engine.contract.adapter import Adapter
from nbpeft.engine.contract.model_adapter import HasSideNetwork
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.runtime.merging import partly_merged
from nbpeft.engine.tree.model_tree import parameter_counts, unwrapped
from nbpeft.engine.wrappers.block import AdaptedBlock
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.model.handle.tuner import tuner_class

_IRREGULAR = "irregular"
"""PEFT's value for a property whose values differ between layers."""


@dataclass
class TunerLayerStatus:
    """One adapted layer, or one module of ``modules_to_save``. Field names and values are PEFT's."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """A whole model. Field names and values are PEFT's."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


LayerStatus = TunerLayerStatus
ModelStatus = TunerModelStatus


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Returns one record for each adapted layer and each module of ``modules_to_save``.

    Names are paths below ``model.base_model`` for a PeftModel, and paths in the base model otherwise.
    """
    manager = require_manager(model)
    prefix = "" if _bare(model, manager) else "model."
    found = []
    for path, module in manager.model.named_modules():
        if isinstance(module, AdaptedLayer):
            if (
                not all(isinstance(adapter, HasSideNetwork) for adapter in module.adapters.values())
                or not module.adapters
            ):
                found.append(_layer(manager, prefix + path, module))
        elif isinstance(module, AdaptedBlock):
            found.append(_of_modules_in(prefix + path, module, module.adapted_as))
        elif isinstance(module, ModulesToSaveWrapper):
            found.append(_of_modules_in(prefix + path, module, "ModulesToSaveWrapper"))
    return found


def _bare(model: nn.Module, manager: AdapterManager) -> bool:
    return unwrapped(model) is manager.model


def _layer(manager: AdapterManager, name: str, layer: AdaptedLayer) -> TunerLayerStatus:
    adapters = {own: layer.adapter(own) for own in layer.adapters}
    containers = {adapter.peft.container for adapter in adapters.values()}
    return TunerLayerStatus(
        name=".".join(filter(None, (name, containers.pop() if len(containers) == 1 else ""))),
        module_type=layer.adapted_as,
        enabled=layer.adapters_enabled,
        active_adapters=layer.active_adapters,
        merged_adapters=list(layer.merged_names),
        quantization_backend=layer.backend.backend_name or None,
        **_of_tensors({own: _trained(manager, own, adapter) for own, adapter in adapters.items()}),
    )


def _trained(manager: AdapterManager, name: str, adapter: Adapter) -> list[nn.Parameter]:
    """Returns the parameters of an adapter on a layer, or the shared parameters if it has none of its own."""
    shared = None if adapter._parameters else manager.shared(name)
    if shared is not None:
        return list(shared.parameters())
    return [parameter for key, parameter in adapter.named_parameters() if key not in adapter.peft.constants]


def _of_modules_in(name: str, wrapper: ModulesToSaveWrapper | AdaptedBlock, title: str) -> TunerLayerStatus:
    own = wrapper._named()
    return TunerLayerStatus(
        name=name,
        module_type=title,
        enabled=wrapper.adapters_enabled,
        active_adapters=[adapter for adapter in wrapper.chosen_names() if adapter in own],
        merged_adapters=[],
        **_of_modules(own),
    )


def _method(manager: AdapterManager, name: str) -> str:
    return method_of(manager.configs[name]).peft_type


def _of_modules(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    return _of_tensors({name: list(module.parameters()) for name, module in modules.items()})


def _of_tensors(parameters: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, Any]:
    """Returns the status fields that are computed from the parameters of each adapter."""
    return {
        "requires_grad": {name: _same(p.requires_grad for p in own) for name, own in parameters.items() if own},
        "available_adapters": sorted(parameters),
        "devices": {name: sorted({p.device.type for p in own}) for name, own in parameters.items() if own},
    }


def _same(values: Iterable[Any]) -> Any:
    """Returns the common value, or "irregular" if the values differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else _IRREGULAR


def _merged(manager: AdapterManager) -> list[str] | str:
    """Returns the adapters that are merged on every layer that has them, or "irregular"."""
    return _IRREGULAR if partly_merged(manager.layers, manager.merged) else list(manager.merged)


def _same_list(values: Iterable[Sequence[str]]) -> list[str] | str:
    """Returns the common list of names, or "irregular" if the lists differ."""
    found = _same(map(tuple, values))
    return found if isinstance(found, str) else list(found)


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Returns one record for a handle or an adapted base model, of which it names no methods, as in PEFT."""
    manager = require_manager(model)
    bare = _bare(model, manager)
    trainable, total = parameter_counts(model)
    layers = get_layer_status(model)
    parts = [*manager.layers.values(), *manager.copies.values()]
    tuners = sorted({tuner_class(method_of(config)).__name__ for config in manager.configs.values()})
    return TunerModelStatus(
        base_model_type="other" if bare and not hasattr(model, "config") else type(manager.model).__name__,
        adapter_model_type="None" if bare else "/".join(tuners),
        peft_types={} if bare else {name: _method(manager, name) for name in manager.names},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same([part.adapters_enabled for part in parts] or [manager.enabled]),
        active_adapters=_same_list([part.chosen_names() for part in parts] or [manager.active]),
        merged_adapters=_merged(manager),
        quantization_backend=_same(layer.quantization_backend for layer in layers) if layers else None,
        **_of_tensors({name: manager.parameters(name) for name in manager.names}),
    )
