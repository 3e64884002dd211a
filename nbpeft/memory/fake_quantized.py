"""Quantized layers without data, for models on fake or meta tensors.

No quantization library is needed: a fake layer has the stored bytes of the layer it stands for, and
its forward and backward keep and allocate what the real kernels do: the weight, dequantized for the
time of one product, and in 8 bits also the input.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.base import BaseLayer
from nbpeft.engine.layer import AdaptedLayer

_BLOCK, _NESTED_BLOCK = 64, 256


def quantized_bytes(out_features: int, in_features: int, kind: str, *, double: bool) -> int:
    """Bytes of a quantized weight with its constants and code tables, as bitsandbytes stores it."""
    count = out_features * in_features
    if kind == "int8":
        return count + 4 * out_features
    blocks = -(-count // _BLOCK)
    table = 16 * 4
    nested = blocks + 4 * -(-blocks // _NESTED_BLOCK) + 256 * 4 + 4
    return -(-count // 2) + table + (nested if double else 4 * blocks)


def replace_by_fakes(
    model: nn.Module, layers: Collection[nn.Module], kind: str, *, double: bool, checkpointed: bool
) -> None:
    """Replace linear layers of a fake model, adapted or not, by quantized ones.

    Args:
        model: the model.
        layers: what to replace.
        kind: ``nf4``, ``fp4`` or ``int8``.
        double: whether 4-bit constants are quantized too.
        checkpointed: whether layers are computed again in backward. The 8-bit kernel's copy of its input
            then stays in memory, because it is not kept in the way that checkpointing can drop.
    """
    chosen = {id(layer) for layer in layers}
    for parent in list(model.modules()):
        for attribute, layer in list(parent._modules.items()):
            if layer is None or id(layer) not in chosen:
                continue
            fake = FakeQuantizedLinear(layer, kind, double=double, hides_input=checkpointed and kind == "int8")
            setattr(parent, attribute, fake)
            if isinstance(parent, AdaptedLayer):
                parent.base = BaseLayer(fake, parent.kind, parent.backend)


class FakeQuantizedLinear(nn.Module):
    """One quantized layer; ``weight`` dequantizes it anew each time."""

    def __init__(self, layer: nn.Module, kind: str, *, double: bool, hides_input: bool = False) -> None:
        super().__init__()
        weight: Any = layer.weight
        rows, columns = weight.shape
        if type(layer).__name__ == "Conv1D":
            rows, columns = columns, rows
        self.in_features, self.out_features = columns, rows
        self.kind = kind
        self.hides_input = hides_input
        self.dtype = weight.dtype
        byte_count = quantized_bytes(rows, columns, kind, double=double)
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
        output: Tensor = _Product.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return output


def _integer_product(x: Tensor, out_features: int) -> Tensor:
    """Allocate what the 8-bit product of inference does: rounded inputs, 32-bit sums, scaled sums."""
    half = x.to(torch.float16)
    codes = (half * torch.ones(1, device=x.device)).round().to(torch.int8)
    del half
    sums = codes.new_empty((*x.shape[:-1], out_features), dtype=torch.int32)
    scaled = (sums * sums.float()) * 1.0
    return scaled.to(x.dtype)


class _Product(torch.autograd.Function):
    """A product with a weight that is dequantized for it, in forward and again in backward."""

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
