"""Quantized layers without data, for models on fake or meta tensors.

They need no quantization library. A fake layer has as many bytes as the real one, and its forward and backward allocate
and save the same tensors as the real kernels: the weight is dequantized for one product, and in 8 bits the input is
saved too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.kernels.four_bit import NESTED_BLOCK
from nbpeft.engine.kernels.quantized_matrices import BLOCK, Form, QuantizedMatrices
from nbpeft.engine.kernels.storage import StoredWeight
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.names import QUANT_TYPES


def quantized_bytes(layer: nn.Module, kind: str, *, double: bool) -> int:
    """Return the size in bytes of a quantized weight with its constants and code tables.

    Args:
        layer: a linear layer or a view of experts with a floating-point ``weight``, on any device.
        kind: ``nf4``, ``fp4`` or ``int8``.
        double: whether 4-bit constants are quantized too.
    """
    if isinstance(layer, ParameterView):
        count, rows, columns = layer.shape
        return Form(kind, double and kind != "int8", rows, columns).byte_count(count)
    return _linear_bytes(*_features(layer), kind, double=double)


def code_bytes(layer: nn.Module, kind: str) -> int:
    """Return the bytes of the 4-bit codes of a linear layer, without constants; 0 for 8 bits and for experts."""
    return 0 if kind == "int8" or isinstance(layer, ParameterView) else -(-math.prod(_features(layer)) // 2)


def _features(layer: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features)."""
    weight: Any = layer.weight
    rows, columns = weight.shape
    return (columns, rows) if type(layer).__name__ == "Conv1D" else (rows, columns)


def _linear_bytes(out_features: int, in_features: int, kind: str, *, double: bool) -> int:
    """Return the size of a linear layer's weight in bytes as bitsandbytes stores it."""
    count = out_features * in_features
    if kind == "int8":
        return count + 4 * out_features
    blocks = -(-count // BLOCK)
    table = 16 * 4
    nested = blocks + 4 * -(-blocks // NESTED_BLOCK) + 256 * 4 + 4
    return -(-count // 2) + table + (nested if double else 4 * blocks)


def replace_by_fakes(
    model: nn.Module, layers: Collection[nn.Module], kind: str, *, double: bool, checkpointed: bool
) -> None:
    """Replace linear layers and experts of a fake model, with or without adapters, by quantized ones.

    Args:
        model: the model.
        layers: the layers to replace.
        kind: ``nf4``, ``fp4`` or ``int8``.
        double: whether 4-bit constants are quantized too.
        checkpointed: whether gradient checkpointing is enabled. The 8-bit kernel's copy of its input stays in memory
            then, because the kernel does not save it with ``save_for_backward``, which checkpointing relies on.
    """
    experts = [layer for layer in layers if isinstance(layer, ParameterView)]
    for view in experts:
        stored = FakeQuantizedMatrices.of(view.weight, kind, double=double)
        view.owner._parameters[view.parameter_name] = nn.Parameter(stored, requires_grad=False)
    chosen = {id(layer) for layer in layers}
    for parent in list(model.modules()):
        for attribute, layer in list(parent._modules.items()):
            if layer is None or id(layer) not in chosen:
                continue
            fake = FakeQuantizedLinear(layer, kind, double=double, hides_input=checkpointed and kind == "int8")
            setattr(parent, attribute, fake)
            if isinstance(parent, AdaptedLayer):
                parent.base = BaseLayer(fake, parent.kind, _BACKEND)


class FakeQuantizedWeight(StoredWeight):
    """The storage backend of fake quantized layers; as with real ones, adapters read a dequantized weight."""

    name = "quantized"

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """Return the stored bytes."""
        stored: Any = module.stored
        return [stored]

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Return the dtype that was quantized."""
        return module.dtype  # type: ignore[return-value]

    def dequantize(self, module: nn.Module) -> Tensor:
        """Return a new tensor in the layer's own orientation."""
        weight: Any = module.weight
        return weight  # type: ignore[no-any-return]


_BACKEND: Any = FakeQuantizedWeight()


class FakeQuantizedLinear(nn.Module):
    """A fake quantized linear layer."""

    def __init__(self, layer: nn.Module, kind: str, *, double: bool, hides_input: bool = False) -> None:
        super().__init__()
        weight: Any = layer.weight
        self.out_features, self.in_features = _features(layer)
        self.kind = kind
        self.hides_input = hides_input
        self.dtype = weight.dtype
        byte_count = quantized_bytes(layer, kind, double=double)
        self.register_buffer("stored", torch.empty(byte_count, dtype=torch.uint8, device=weight.device))
        self.register_parameter("bias", layer._parameters.get("bias"))
        self.own_shape = tuple(weight.shape)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the layer's own orientation; a new tensor with every access."""
        stored: Any = self.stored
        return torch.empty(self.own_shape, dtype=self.dtype, device=stored.device)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, (..., in) -> (..., out)."""
        bias = self._parameters["bias"]
        if self.kind == "int8" and not torch.is_grad_enabled():
            return _integer_product(x, self.out_features)
        output: Tensor = _Product.apply(x, bias, self)
        return output


class FakeQuantizedMatrices(QuantizedMatrices):
    """Fake quantized experts. One expert gets all tokens, because the routing is unknown without data."""

    def write(self, weight: Tensor, *, fit: bool) -> None:
        """Do nothing: there is no data to quantize."""

    def matrix(self, i: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a new tensor with the shape of one matrix."""
        return torch.empty(self.form.shape, dtype=dtype or self.dtype, device=self.device)

    def uses(self) -> Iterator[tuple[int, Any]]:
        """Yield all experts one after the other; if some are picked by index, only one."""
        return iter([(0, slice(None))]) if self.picked is not None else super().uses()

    def groups(self, offs: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
        """Yield one expert with all rows."""
        yield 0, slice(0, rows)


def _integer_product(x: Tensor, out_features: int) -> Tensor:
    """Allocate the same as the 8-bit product in inference: rounded inputs, 32-bit sums, scaled sums."""
    half = x.to(torch.float16)
    codes = (half * torch.ones(1, device=x.device)).round().to(torch.int8)
    del half
    sums = codes.new_empty((*x.shape[:-1], out_features), dtype=torch.int32)
    scaled = (sums * sums.float()) * 1.0
    return scaled.to(x.dtype)


class _Product(torch.autograd.Function):
    """A product with a weight that is dequantized in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: FakeQuantizedLinear) -> Tensor:
        ctx.layer = layer
        ctx.hidden = x if layer.hides_input else None
        ctx.save_for_backward(*([x] if layer.kind == "int8" and not layer.hides_input else []))
        weight = x.new_empty((layer.out_features, layer.in_features))
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        layer = ctx.layer
        weight = gradient.new_empty((layer.out_features, layer.in_features))
        bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return gradient @ weight, bias, None


def quantization_of(bits: int, quant_type: str = "nf4") -> str:
    """Return the format of weights that are quantized to so many bits: ``"nf4"``, ``"fp4"`` or ``"int8"``.

    Raises:
        ConfigError: a value is invalid.
    """
    if bits not in (4, 8) or isinstance(bits, bool):
        raise ConfigError(f"bits is {bits!r}; expected 4 or 8", field="bits")
    if quant_type not in QUANT_TYPES:
        near = did_you_mean(str(quant_type), QUANT_TYPES)
        raise ConfigError(f"quant_type is {quant_type!r}; expected 'nf4' or 'fp4'.{near}", field="quant_type")
    if bits == 8 and quant_type != QUANT_TYPES[0]:
        raise ConfigError(f"quant_type={quant_type!r} is for 4 bits; leave it out with bits=8", field="quant_type")
    return "int8" if bits == 8 else quant_type
