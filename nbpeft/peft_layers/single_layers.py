"""Single adapted layers without a model, as PEFT's layer classes create them.

    lora.Conv2d(layer, "default", config, r=8)

Tools that merge an adapter shard by shard build one layer at a time, load its factors, and merge it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nbpeft.engine.contract.registry import method_of, resolve_backend, resolve_layer_kind
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.wrappers.wrapper import Wrapper
from nbpeft.errors import ConfigError, LayerKindError
from nbpeft.peft_layers.layer_types import title_of

_PATH = "layer"
_WHOLE_MODEL: dict[str, Any] = {
    **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication")),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices")),
    **{"rank_pattern": {}, "alpha_pattern": {}, "bias": "none"},
}
"""Settings that select layers of a model, or concern other modules: PEFT's layer classes do not read them."""


def lora_layer(
    title: str,
    base_layer: nn.Module,
    adapter_name: str,
    config: LoraConfig,
    r: int = 0,
    lora_alpha: float = 1,
    *_: Any,
    parameter_name: str | None = None,
    **__: Any,
) -> Any:
    """Creates an adapted layer around a layer that is in no adapted model, and freezes that layer.

    Args:
        title: PEFT's package and class of the adapted layer, such as ``lora.Linear``.
        base_layer: the layer; for a ``lora.ParamWrapper``, the module with the parameter.
        adapter_name: name of the adapter.
        config: the other settings of the adapter; its targets are ignored.
        r: rank.
        lora_alpha: alpha.
        *_: ignored; accepted as in PEFT.
        parameter_name: name of the parameter for a ``lora.ParamWrapper``, else None.
        **__: ignored; accepted as in PEFT.

    Raises:
        LayerKindError: the layer has adapters already, or this class does not adapt it.
        ConfigError: the config contradicts the layer.
    """
    name = type(base_layer).__name__
    if isinstance(base_layer, Wrapper):
        raise LayerKindError(f"{title} cannot be built around a {name} with adapters: adapt the whole model")
    if config.custom_layer_class(base_layer) is not None:
        raise ConfigError(f"{title} cannot be the custom class of a {name} with this config: do not register it")
    if parameter_name is None:
        _check_kind(title, base_layer, config)
        targets: dict[str, Any] = {"target_modules": [_PATH], "target_parameters": None}
    else:
        targets = {"target_modules": [], "target_parameters": [f"{_PATH}.{parameter_name}"]}
    own = config.copy(r=r, lora_alpha=lora_alpha, **targets, **_WHOLE_MODEL)
    model = nn.ModuleDict({_PATH: base_layer})
    manager = AdapterManager(model)
    with manager.transaction():
        manager.add(adapter_name, own, trainable=not config.inference_mode, half=True)
        AdapterManager.attach(model, manager)
    layer = model[_PATH]
    layer.__dict__["single_in"] = model  # the layer's commands need the manager, which only the model keeps alive
    return layer


def lora_parameter(
    title: str,
    base_layer: nn.Module,
    adapter_name: str,
    parameter_name: str,
    config: LoraConfig,
    r: int = 0,
    lora_alpha: float = 1,
    **_: Any,
) -> Any:
    """Creates a ``lora.ParamWrapper``, whose arguments have another order; see ``lora_layer``."""
    return lora_layer(title, base_layer, adapter_name, config, r, lora_alpha, parameter_name=parameter_name)


def _check_kind(title: str, base_layer: nn.Module, config: LoraConfig) -> None:
    kind, backend = resolve_layer_kind(base_layer), resolve_backend(base_layer)
    name = type(base_layer).__name__
    found = "" if kind is None or backend is None else title_of([method_of(config)], kind, backend)
    if kind is None or found != title:
        raise LayerKindError(f"{title} does not adapt a {name}" + (f", but {found} does" if found else ""))
    if config.fan_in_fan_out and kind.name != "conv1d":
        raise ConfigError(f"fan_in_fan_out=True is not for a {name}: leave it out", field="fan_in_fan_out")
