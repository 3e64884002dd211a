"""The functions of ``peft.functional`` and ``peft.utils``, for models with or without a PeftModel."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from nbpeft.engine.config.adapter_names import names_in
from nbpeft.engine.contract.adapter import AdapterConfig, store_of
from nbpeft.engine.kernels.storage import is_packed
from nbpeft.engine.runtime.manager import require_manager
from nbpeft.errors import ConfigError


def get_peft_config(config_dict: Mapping[str, Any]) -> AdapterConfig:
    """Returns the config for a dictionary such as the content of ``adapter_config.json``.

    Raises:
        ConfigError: it is not a dictionary or has no ``peft_type``, or a value is invalid.
    """
    if not isinstance(config_dict, Mapping):
        raise ConfigError(
            f"expected a dictionary with a 'peft_type', such as {{'peft_type': 'LORA'}}, not {config_dict!r:.60}"
        )
    if config_dict.get("peft_type") is None:
        raise ConfigError("the dictionary has no 'peft_type', such as 'LORA'", field="peft_type")
    return store_of(AdapterConfig).make(dict(config_dict))


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: type | None = None
) -> None:
    """Activates one adapter or several and makes them trainable, or frozen for inference.

    Args:
        model: a PeftModel or an adapted base model.
        adapter_name: one name or several.
        inference_mode: freeze them.
        layer_cls: accepted for compatibility with PEFT and ignored.

    Raises:
        UnknownAdapterError: there is no such adapter.
    """
    require_manager(model).activate(adapter_name, trainable=not inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "lora_", layer_cls: type | None = None
) -> list[str] | None:
    """Removes an adapter; warns if it does not exist, because other libraries delete adapters from lists of names.

    Args:
        model: a PeftModel or an adapted base model.
        adapter_name: name of the adapter.
        prefix: accepted for compatibility with PEFT and ignored.
        layer_cls: accepted for compatibility with PEFT and ignored.

    Returns:
        The adapters that are active now, or None if there are none.
    """
    manager = require_manager(model)
    if isinstance(adapter_name, str) and adapter_name not in manager.configs:
        have = ", ".join(map(repr, manager.names)) or "none"
        warnings.warn(f"there is no adapter {adapter_name!r} to delete; the model has: {have}.", stacklevel=2)
    else:
        manager.remove(adapter_name)
    return list(manager.active) or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Sets ``requires_grad`` of the parameters of adapters, active or not.

    Args:
        model: a PeftModel or an adapted base model.
        adapter_names: one name or several.
        requires_grad: the new value.
    """
    manager = require_manager(model)
    names = names_in(adapter_names)
    manager.require(*names)
    for name in names:
        manager.set_requires_grad(name, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Casts the half-precision tensors of an adapter to float32.

    Args:
        model: a PeftModel or an adapted base model.
        adapter_name: name of the adapter.
        autocast_adapter_dtype: False changes nothing.
    """
    manager = require_manager(model)
    manager.require(adapter_name)
    if autocast_adapter_dtype:
        layers = manager.layers_with(adapter_name).values()
        frozen = (layer.adapter(adapter_name).parameters() for layer in layers)
        _cast([*manager.parameters(adapter_name), *chain.from_iterable(frozen)], torch.float32)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts frozen parameters to half precision and trainable ones to float32, for automatic mixed precision.

    Quantized weights are not changed.

    Args:
        model: any model.
        dtype: dtype of the frozen parameters, ``torch.float16`` or ``torch.bfloat16``.
    """
    for parameter in model.parameters():
        _cast([parameter], torch.float32 if parameter.requires_grad else dtype)


def _cast(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1 and not is_packed(parameter):
            parameter.data = parameter.data.to(dtype)


class DoraCaching:
    """Does nothing: DoRA always caches its norm, and recomputes it when a weight changes.

    Args:
        enabled: accepted for compatibility with PEFT and ignored.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> None:
        """Changes nothing."""
        self.enabled = enabled

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
