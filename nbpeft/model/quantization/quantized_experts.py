"""Experts of a mixture beside bitsandbytes' layers: in the same settings, in memory or while a model is read.

bitsandbytes knows linear layers alone; transformers keeps the experts of a layer in bare parameters.
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
from nbpeft.engine.tree.model_tree import experts_to_quantize, manager_of, quantization_method
from nbpeft.errors import ConfigError


def remaining_experts(model: nn.Module) -> dict[str, ParameterView]:
    """Returns path -> parameter of the experts that ``quantize_experts`` quantizes.

    None where the model is not quantized by bitsandbytes, or carries adapters.
    """
    manager = manager_of(model)
    adapted = manager is not None and manager.alive and bool(manager.names)
    if adapted or quantization_method(model) != "bitsandbytes":
        return {}
    return experts_to_quantize(model, _skipped(_settings_of(model)))


@torch.no_grad()
def quantize_experts(model: nn.Module) -> None:
    """Quantizes the experts of a model whose linear layers bitsandbytes quantized, in the settings of those.

    All or none: until the last one is quantized the old parameters are kept.
    """
    settings = _settings_of(model)
    made = [(view, quantized_parameter(view.weight, settings)) for view in remaining_experts(model).values()]
    for view, parameter in made:
        view.owner._parameters[view.parameter_name] = parameter
    save_dequantized(model)


def quantized_parameter(weight: Tensor, settings: Any, device: torch.device | None = None) -> nn.Parameter:
    """Returns the parameter of experts (experts, rows, columns), quantized.

    Args:
        weight: floating.
        settings: a ``transformers.BitsAndBytesConfig``.
        device: where it is to be; where the weight is if left out.
    """
    kind = "int8" if settings.load_in_8bit else settings.bnb_4bit_quant_type
    double = not settings.load_in_8bit and settings.bnb_4bit_use_double_quant
    return nn.Parameter(QuantizedMatrices.of(weight.detach(), kind, double=double, device=device), requires_grad=False)


@contextmanager
def quantizing_while_reading(settings: Any) -> Iterator[None]:
    """Context manager: transformers quantizes experts, too, as it reads a model with these settings.

    So no more than one parameter of them is in memory as it was.
    """
    known = importlib.import_module("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING
    key = "bitsandbytes_8bit" if settings.load_in_8bit else "bitsandbytes_4bit"
    plain = known[key]
    known[key] = _quantizer_with_experts(plain, settings)
    try:
        yield
    finally:
        known[key] = plain


def _quantizer_with_experts(plain: Any, settings: Any) -> Any:
    """Returns a class of transformers' quantizers; for other settings than these it does as the plain one."""
    given = settings.to_dict()

    class WithExperts(plain):  # type: ignore[misc]
        paths: frozenset[str] | None = None

        def is_expert(self, model: nn.Module, name: str) -> bool:
            if self.paths is None:
                ours = self.quantization_config.to_dict() == given  # automatic classes hand on a copy
                skipped = self.modules_to_not_convert or ()
                self.paths = frozenset(experts_to_quantize(model, skipped) if ours else ())
            return name in self.paths

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
            self.__class__ = plain  # a class of a function cannot be pickled
            return done

    return WithExperts


def save_dequantized(model: Any) -> None:
    """Makes ``save_pretrained`` write quantized experts as floating tensors, which transformers can read again.

    Does nothing where transformers' flags are not set.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.get_state_dict_and_metadata = _dequantized_state


def _dequantized_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns what a model saves, and no metadata.

    Raises:
        ConfigError: transformers would look for other weights.
    """
    others = importlib.import_module("transformers.quantizers.base").MODULES_TO_PATCH_FOR_QUANTIZATION
    found = next((name for name in (type(module).__name__ for module in model.modules()) if name in others), None)
    if found is not None:
        raise ConfigError(
            f"a {type(model).__name__} with quantized experts cannot be saved: transformers takes {found} of a "
            "quantized model apart when it loads it; save the adapters alone, or merge into a folder"
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
