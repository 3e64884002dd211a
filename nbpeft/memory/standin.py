"""Quantized layers that take the memory of real ones, for a model on fake tensors.

No quantization library is needed: a stand-in has the stored bytes of the layer it stands for, and
its forward and backward keep and allocate what the real kernels do: the weight, dequantized for the
time of one product, and in 8 bits also the input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.base import BaseLayer
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.model_tree import linear_layers_to_quantize, walk
from nbpeft.errors import ConfigError, did_you_mean

QUANTIZATIONS = ("nf4", "fp4", "int8")
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


def check_kind(kind: str | None) -> str | None:
    """``kind`` if it is a known quantization or None.

    Raises:
        ConfigError: it is something else.
    """
    if kind is not None and kind not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization {kind!r} is not one of {', '.join(QUANTIZATIONS)} or None."
            + did_you_mean(str(kind), QUANTIZATIONS),
            quantization=kind,
        )
    return kind


def put_standins(model: nn.Module, kind: str, *, double: bool, checkpointed: bool = False) -> None:
    """Replaces every quantizable layer of a fake model by its stand-in.

    With ``checkpointed`` layers the 8-bit kernel's copy of its input stays in memory, because it
    is not kept in the way that checkpointing can drop.
    """
    layers = linear_layers_to_quantize(model)
    for site in list(walk(model)):
        if layers.get(site.path) is site.module:
            standin = StandIn(site.module, kind, double=double, hides_input=checkpointed and kind == "int8")
            if isinstance(site.wrapper, AdaptedLayer):
                site.wrapper.base_layer = standin
                site.wrapper.base = BaseLayer(standin, site.wrapper.kind, site.wrapper.backend)
            else:
                setattr(site.parent, site.attribute, standin)


class StandIn(nn.Module):
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
        """The dequantized weight in the layer's own orientation; new with every look."""
        stored: Any = self.stored
        return torch.empty(self.own_shape, dtype=self.dtype, device=stored.device)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's map, (..., in) -> (..., out)."""
        bias = self._parameters["bias"]
        if self.kind == "int8" and not torch.is_grad_enabled():
            return _integer_product(x, self.out_features)
        output: Tensor = _Product.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return output


def _integer_product(x: Tensor, out_features: int) -> Tensor:
    """What the 8-bit product of inference allocates: rounded inputs, 32-bit sums, scaled sums."""
    half = x.to(torch.float16)
    codes = (half * torch.ones(1, device=x.device)).round().to(torch.int8)
    del half
    sums = codes.new_empty((*x.shape[:-1], out_features), dtype=torch.int32)
    scaled = (sums * sums.float()) * 1.0
    return scaled.to(x.dtype)


class _Product(torch.autograd.Function):
    """A product with a weight that is dequantized for it, in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: StandIn) -> Tensor:
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
