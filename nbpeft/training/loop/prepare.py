"""Preparing a quantized base model for training adapters."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.tree.model_tree import is_quantized, is_quantized_layer, quantization_method
from nbpeft.engine.wrappers.fake_quant import set_quantization_aware
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.memory.checkpointing import enable_checkpointing

logger = logging.getLogger("nbpeft.training")

Upcast = Literal["norms", "peft", "none"]
_UPCASTS = ("norms", "peft", "none")
_HALF = (torch.float16, torch.bfloat16)
_KEEPS_DTYPES = ("gptq", "aqlm", "eetq", "hqq", "torchao")
"""Quantization methods for which PEFT does not cast parameters."""


@dataclass(frozen=True)
class Preparation:
    """What :func:`prepare_model` did."""

    frozen_count: int
    """Number of frozen parameters (elements, not tensors)."""
    upcast_count: int
    """Number of tensors that were cast to float32."""
    extra_bytes: int
    """Additional memory in bytes."""
    gradient_checkpointing: bool
    inputs_require_grad: bool

    def __str__(self) -> str:
        parts = ["base frozen"]
        if self.upcast_count:
            parts.append(f"{self.upcast_count} tensors in float32 (+{self.extra_bytes / 1e6:,.1f} MB)")
        if self.gradient_checkpointing:
            parts.append("gradient checkpointing on")
        return ", ".join(parts)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast: Upcast | None = None,
    quantization_aware: bool = False,
) -> Any:
    """Freezes a base model and prepares it for training adapters. Returns the model.

    Norms of a quantized model compute in float32 and return the dtype of their input; its embeddings and head are not
    cast. All parameters of a model that is not quantized are cast to float32, as in PEFT; ``upcast="peft"`` casts
    everything that is not quantized. This needs memory, and a warning reports how much.

    Args:
        model: a transformers model, quantized or not.
        use_gradient_checkpointing: whether a quantized model recomputes activations.
        gradient_checkpointing_kwargs: options of ``torch.utils.checkpoint``; ``use_reentrant`` is False by default.
        auto_clear_cache: whether to free cached device memory after casting.
        upcast: ``"norms"``, ``"peft"`` or ``"none"``; None means "norms" for a quantized model and "peft" for others.
        quantization_aware: whether new adapters compute as if merged into the quantized weights and rounded with them,
            also in training; see ``LoraConfig``.

    Raises:
        ConfigError: ``upcast`` is invalid, or ``quantization_aware`` is requested for a model that is not quantized.
    """
    quantized = is_quantized(model)
    if quantization_aware and not quantized:
        raise ConfigError(
            f"quantization_aware=True is for quantized models, and this {type(model).__name__} is not one",
            field="quantization_aware",
        )
    # A flag alone, of a model in which no layer is quantized (any more), says nothing about its tensors.
    keeps = bool(quantization_method(model)) or any(map(is_quantized_layer, model.modules()))
    chosen: Upcast = upcast if upcast is not None else "norms" if keeps else "peft"
    done = prepare_model(
        model, use_gradient_checkpointing, gradient_checkpointing_kwargs, auto_clear_cache, upcast=chosen
    )
    set_quantization_aware(model, quantization_aware)
    if chosen == "peft" and done.extra_bytes:
        cause = "upcast='peft'" if upcast is not None else "the model is not quantized: preparing it"
        warnings.warn(
            f"{cause} turned {done.upcast_count} tensors into float32: {done.extra_bytes / 1e6:,.1f} MB more. "
            "upcast='norms' trains as well without.",
            stacklevel=2,
        )
    logger.info("prepared for training: %s", done)
    return model


def prepare_model(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast: Upcast = "norms",
) -> Preparation:
    """Does the same as :func:`prepare_model_for_kbit_training`, but returns what was done."""
    check_upcast(upcast)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    if upcast == "norms":
        _compute_norms_in_float32(model)
    cast = _to_float32(becoming_float32(model, upcast))
    if auto_clear_cache and cast[0] and torch.cuda.is_available():
        torch.cuda.empty_cache()
    checkpointing = use_gradient_checkpointing and is_quantized(model)
    inputs = False
    if checkpointing:
        options = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        inputs = bool(options["use_reentrant"])
        if inputs:
            _make_inputs_require_grad(model)
        enable_checkpointing(model, options)
    return Preparation(sum(parameter.numel() for parameter in parameters), *cast, checkpointing, inputs)


def check_upcast(upcast: str) -> None:
    """Refuses an invalid value of ``upcast``.

    Raises:
        ConfigError: ``upcast`` is not ``"norms"``, ``"peft"`` or ``"none"``.
    """
    if upcast not in _UPCASTS:
        near = did_you_mean(str(upcast), _UPCASTS)
        raise ConfigError(f"upcast={upcast!r} is not one of {', '.join(_UPCASTS)}.{near}", field="upcast")


def becoming_float32(model: nn.Module, upcast: Upcast) -> list[nn.Parameter]:
    """Returns the parameters that ``prepare_model`` casts to float32; nothing is changed.

    Args:
        model: the model.
        upcast: ``"norms"``, ``"peft"`` or ``"none"``.
    """
    if upcast == "norms":
        return [parameter for _, halves in _norms(model) for parameter in halves]
    if upcast != "peft" or quantization_method(model) in _KEEPS_DTYPES:
        return []
    return [
        parameter
        for parameter in model.parameters()
        if parameter.dtype in _HALF
        and type(parameter).__name__ != "Params4bit"
        and not isinstance(parameter, QuantizedMatrices)
    ]


def _to_float32(parameters: list[nn.Parameter]) -> tuple[int, int]:
    """Casts parameters to float32; returns their number and the additional bytes."""
    size = 0
    for parameter in parameters:
        size += parameter.numel() * (4 - parameter.element_size())
        parameter.data = parameter.data.to(torch.float32)
    return len(parameters), size


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yields norm modules with weights in half precision, and these weights."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        halves = [parameter for parameter in own if parameter.dtype in _HALF]
        if "norm" in type(module).__name__.lower() and halves and all(part.ndim == 1 for part in own):
            yield module, halves


def _compute_norms_in_float32(model: nn.Module) -> None:
    # Some norms refuse half-precision inputs if their weight is float32, others return float32 to the next layer.
    for module, halves in _norms(model):
        module.register_forward_pre_hook(functools.partial(_compute_in_float32))
        module.register_forward_hook(functools.partial(_restore_dtype, halves[0].dtype))


def _compute_in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value for value in inputs)


def _restore_dtype(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) and output.dtype == torch.float32 else output


def _make_inputs_require_grad(model: Any) -> None:
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)
