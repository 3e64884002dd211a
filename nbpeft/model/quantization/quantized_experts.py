"""Quantized experts of a mixture, which bitsandbytes does not support.

bitsandbytes only quantizes linear layers, but transformers stores the experts of a layer in bare parameters. They are
quantized with the settings of the linear layers, in memory or while a model is read.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.tree.model_tree import experts_to_quantize, manager_of, quantization_method, read_directly
from nbpeft.errors import ConfigError


def remaining_experts(model: nn.Module) -> dict[str, ParameterView]:
    """Returns path -> view of the experts that ``quantize_experts`` quantizes.

    It is empty if the model is not quantized by bitsandbytes, or has adapters.
    """
    manager = manager_of(model)
    adapted = manager is not None and manager.alive and bool(manager.names)
    if adapted or quantization_method(model) != "bitsandbytes":
        return {}
    return experts_to_quantize(model, _skipped(_settings_of(model)))


@torch.no_grad()
def quantize_experts(model: nn.Module) -> None:
    """Quantizes the experts of a model with the settings of its linear layers, which bitsandbytes has quantized.

    Either all are replaced or none: the old parameters stay in memory until the last one is quantized.
    """
    settings = _settings_of(model)
    quantized = [(view, quantized_parameter(view.weight, settings)) for view in remaining_experts(model).values()]
    for view, parameter in quantized:
        view.owner._parameters[view.parameter_name] = parameter
    save_dequantized(model)


def quantized_parameter(weight: Tensor, settings: Any, device: torch.device | None = None) -> nn.Parameter:
    """Quantizes a parameter of experts (experts, rows, columns).

    Args:
        weight: the floating-point parameter.
        settings: a ``transformers.BitsAndBytesConfig``.
        device: device of the result; by default that of the weight.
    """
    kind = "int8" if settings.load_in_8bit else settings.bnb_4bit_quant_type
    double = not settings.load_in_8bit and settings.bnb_4bit_use_double_quant
    return nn.Parameter(QuantizedMatrices.of(weight.detach(), kind, double=double, device=device), requires_grad=False)


@contextmanager
def quantizing_while_reading(settings: Any) -> Iterator[None]:
    """Context manager: makes transformers also quantize experts while it reads a model with these settings.

    Thus at most one unquantized parameter of experts is in memory at a time.
    """
    known = importlib.import_module("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING
    key = "bitsandbytes_8bit" if settings.load_in_8bit else "bitsandbytes_4bit"
    plain = known[key]
    known[key] = _quantizer_with_experts(plain, settings)
    try:
        yield
    finally:
        known[key] = plain


def nothing_to_quantize(model: nn.Module) -> ConfigError:
    """Returns the error for a model without layers that can be quantized, which names the linear layers that it has."""
    kinds = sorted({type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)} - {"Linear"})
    others = f": {', '.join(kinds)} cannot be quantized; load the model in bfloat16" if kinds else ""
    return ConfigError(f"{type(model).__name__} has no linear layer to quantize{others}")


def _quantizer_with_experts(plain: Any, settings: Any) -> Any:
    """Returns a subclass of one of transformers' quantizers; with other settings it behaves like its base class."""
    wanted = settings.to_dict()

    class WithExperts(plain):  # type: ignore[misc]
        paths: frozenset[str] | None = None

        def is_expert(self, model: nn.Module, name: str) -> bool:
            if self.paths is None:
                ours = self.quantization_config.to_dict() == wanted  # auto classes pass on a copy
                skipped = self.modules_to_not_convert or ()
                self.paths = frozenset(experts_to_quantize(model, skipped) if ours else ())
            return name in self.paths

        def get_modules_to_not_convert(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:
            return [*super().get_modules_to_not_convert(model, *args, **kwargs), *read_directly(model)]

        def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
            super()._process_model_before_weight_loading(model, *args, **kwargs)
            if not any(type(module).__module__.startswith("bitsandbytes") for module in model.modules()):
                raise nothing_to_quantize(model)

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return self.is_expert(model, param_name) or super().param_needs_quantization(model, param_name, **kwargs)

        def get_quantize_ops(self) -> Any:
            quantizer, operation = self, super().get_quantize_ops()

            class Quantize(type(operation)):  # type: ignore[misc]
                def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> Any:
                    found: dict[str, Tensor] = {}
                    for name, value in input_dict.items():
                        if quantizer.is_expert(model, name):
                            tensor = value[0] if isinstance(value, list) else value
                            found[name] = quantized_parameter(tensor, settings)
                        else:
                            found |= super().convert({name: value}, *args, model=model, **kwargs)
                    return found

            return Quantize(self)

        def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
            done = super().postprocess_model(model, **kwargs)
            self.__dict__.pop("paths", None)
            self.__class__ = plain  # a class that is defined in a function cannot be pickled
            return done

    return WithExperts


def save_dequantized(model: Any) -> None:
    """Makes ``save_pretrained`` write quantized experts as floating-point tensors, which transformers can read.

    Does nothing if transformers' flags are not set.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.get_state_dict_and_metadata = _dequantized_state


def _dequantized_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the state dict to save, with dequantized experts, and no metadata.

    Raises:
        ConfigError: transformers would expect other weights when it loads the model.
    """
    others = importlib.import_module("transformers.quantizers.base").MODULES_TO_PATCH_FOR_QUANTIZATION
    found = next((name for name in (type(module).__name__ for module in model.modules()) if name in others), None)
    if found is not None:
        raise ConfigError(
            f"a {type(model).__name__} with quantized experts cannot be saved: transformers replaces {found} when it "
            "loads a quantized model; save only the adapters, or merge into a folder"
        )
    state = {
        name: value.dequantize() if isinstance(value, QuantizedMatrices) else value
        for name, value in model.state_dict().items()
    }
    return state, {}


def _settings_of(model: Any) -> Any:
    """Returns the ``BitsAndBytesConfig`` of a model that transformers loaded."""
    return model.config.quantization_config


def _skipped(settings: Any) -> list[str]:
    return list(settings.llm_int8_skip_modules or ())
