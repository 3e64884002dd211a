"""PEFT's status records of layers and models."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.registry import method_of
from nbpeft.model.counting import parameter_counts
from nbpeft.model.tensors import manager_of


@dataclass
class LayerStatus:
    """One adapted layer. Field names are PEFT's."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


@dataclass
class ModelStatus:
    """A whole model. Field names are PEFT's."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """One record for each adapted layer of a handle or an adapted base model."""
    manager = manager_of(model)
    return [_layer(manager, path) for path in manager.layers]


def _layer(manager: AdapterManager, path: str) -> LayerStatus:
    layer = manager.layers[path]
    adapters = {name: list(layer.adapter(name).parameters()) for name in layer.adapters}
    return LayerStatus(
        name=path,
        module_type=next((method_of(manager.configs[name]).label.lower() for name in adapters), ""),
        enabled=manager.enabled,
        active_adapters=list(manager.active),
        merged_adapters=list(layer.merged),
        requires_grad={name: any(p.requires_grad for p in parameters) for name, parameters in adapters.items()},
        available_adapters=sorted(adapters),
        devices={name: sorted({p.device.type for p in parameters}) for name, parameters in adapters.items()},
        quantization_backend=None if layer.backend.name == "dense" else layer.backend.name,
    )


def get_model_status(model: nn.Module) -> ModelStatus:
    """One record for a handle or an adapted base model."""
    manager = manager_of(model)
    trainable, total = parameter_counts(model)
    parameters = {name: manager.parameters(name) for name in manager.names}
    return ModelStatus(
        base_model_type=type(manager.model).__name__,
        adapter_model_type="None" if model is manager.model else type(getattr(model, "base_model", model)).__name__,
        peft_types={name: str(config.peft_type) for name, config in manager.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(manager.layers),
        enabled=manager.enabled,
        active_adapters=list(manager.active),
        merged_adapters=list(manager.merged),
        requires_grad={name: any(p.requires_grad for p in own) for name, own in parameters.items()},
        available_adapters=sorted(manager.names),
        devices={name: sorted({p.device.type for p in own}) for name, own in parameters.items()},
    )
