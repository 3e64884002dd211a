"""Quantized layers without data, for models on fake or meta tensors.

No quantization library is needed: a fake layer has the stored bytes of the layer it stands for, and
its forward and backward keep and allocate what the real kernels do: the weight, dequantized for the
time of one product, and in 8 bits also the input.
"""

from __future__ import annotations

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


def quantized_bytes(layer: nn.Module, kind: str, *, double: bool) -> int:
    """Bytes of the quantized weight of a linear layer or of experts, with its constants and code tables.

    Args:
        layer: has a floating ``weight``, on any device.
        kind: ``nf4``, ``fp4`` or ``int8``.
        double: whether 4-bit constants are quantized too.
    """
    if isinstance(layer, ParameterView):
        count, rows, columns = layer.shape
        return Form(kind, double and kind != "int8", rows, columns).byte_count(count)
    return _linear_bytes(*_features(layer), kind, double=double)


def _features(layer: nn.Module) -> tuple[int, int]:
    """(out, in) features."""
    weight: Any = layer.weight
    rows, columns = weight.shape
    return (columns, rows) if type(layer).__name__ == "Conv1D" else (rows, columns)


def _linear_bytes(out_features: int, in_features: int, kind: str, *, double: bool) -> int:
    """As bitsandbytes stores it."""
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
    """Replace linear layers and experts of a fake model, adapted or not, by quantized ones.

    Args:
        model: the model.
        layers: what to replace.
        kind: ``nf4``, ``fp4`` or ``int8``.
        double: whether 4-bit constants are quantized too.
        checkpointed: whether layers are computed again in backward. The 8-bit kernel's copy of its input
            then stays in memory, because it is not kept in the way that checkpointing can drop.
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
    """How a fake layer stores its weight: what an adapter reads of it is dequantized for it, as of a real one."""

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
    """One quantized layer; ``weight`` dequantizes it anew each time."""

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
        output: Tensor = _Product.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return output


class FakeQuantizedMatrices(QuantizedMatrices):
    """Quantized experts of which only the shapes are known; as in a forecast, one of them gets all tokens."""

    def write(self, weight: Tensor, *, fit: bool) -> None:
        """Changes nothing."""

    def matrix(self, i: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a new tensor of the matrix's shape."""
        return torch.empty(self.form.shape, dtype=dtype or self.dtype, device=self.device)

    def uses(self) -> Iterator[tuple[int, Any]]:
        """Yield all of them one after the other, of some that are picked by index one."""
        return iter([(0, slice(None))]) if self.picked is not None else super().uses()

    def groups(self, offs: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
        """Yield one with all rows."""
        yield 0, slice(0, rows)


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
