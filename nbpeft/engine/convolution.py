"""What the convolutions of all dimensions share.

    y = s * B(A(dropout(x)))      A: (r, in, *kernel), B: (out, r / groups, 1, …)

A is a convolution with the layer's stride, padding and dilation, B one with kernel 1 and the
layer's groups. A sees all input channels also where the layer is grouped (PEFT's files have it
so); the product is then no weight of the layer, and can neither be merged nor normalised.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.adapter import Dropout
from nbpeft.engine.lowrank import add_delta, composes, compute_dtype, draw_seed, keep_mask, keep_scale, without_autocast
from nbpeft.errors import ConfigError, MergeError


class Convolution:
    """Base of the hosts of nn.Conv1d, nn.Conv2d and nn.Conv3d."""

    dimensions: ClassVar[int]
    priority = 20
    factor_names = ("lora_A", "lora_B")
    zero_factor = 1
    multiplies = False

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dimensions - 1])

    def features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_channels, module.out_channels  # type: ignore[return-value]

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def factor_shapes(self, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if rank % module.groups:
            raise ConfigError(
                f"a {type(module).__name__} with {module.groups} groups cannot take rank {rank}: "
                f"choose a multiple of {module.groups}, or exclude it",
                rank=rank,
                groups=module.groups,
            )
        ones = (1,) * self.dimensions
        return (
            (rank, module.in_channels, *module.kernel_size),
            (module.out_channels, rank // module.groups, *ones),
        )

    def low_rank(
        self,
        module: nn.Module,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        dropout: Dropout,
        onto: Tensor | None = None,
    ) -> Tensor:
        delta = self._low_rank(module, x, lora_A, lora_B, scaling, dropout)
        return delta if onto is None else add_delta(onto, delta)

    def _low_rank(
        self, module: nn.Module, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, dropout: Dropout
    ) -> Tensor:
        if x.device != lora_A.device:
            x = x.to(lora_A.device)
        dtype = compute_dtype(x, lora_A)
        probability = dropout.probability if dropout.acts else 0.0
        if probability >= 1.0 or composes():
            dropped = F.dropout(x.to(dtype), probability) if probability else x.to(dtype)
            return self._compose(module, dropped, lora_A, lora_B, scaling)
        if torch.is_grad_enabled() and (probability or x.dtype != dtype):
            arguments = (x, lora_A, lora_B, scaling, probability, dtype, self, module)
            return _LeanProduct.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
        dropped = _dropped(x, probability, draw_seed() if probability else 0, dtype)
        return self._compose(module, dropped, lora_A, lora_B, scaling)

    def _compose(self, module: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
        """s * B(A(x)) in the dtype of ``x``."""
        hidden = self._convolve(module, x, lora_A.to(x.dtype), groups=1)
        pointwise = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        return pointwise(hidden * scaling, lora_B.to(x.dtype), groups=module.groups)

    def linear(self, module: Any, x: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(module, x, weight, groups=module.groups)

    def _convolve(self, module: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """The layer's convolution, padding mode included, with another weight and no bias."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        return convolve(x, weight, None, module.stride, padding, module.dilation, groups)

    def product(self, module: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        refusal = self.product_refusal(module)
        if refusal:
            raise MergeError(refusal)
        return (lora_B.flatten(1) @ lora_A.flatten(1)).view(module.weight.shape)

    def product_refusal(self, module: Any) -> str:
        if module.groups == 1:
            return ""
        return (
            f"a {type(module).__name__} with {module.groups} groups: the adapter sees all input channels, "
            "a group of the layer only its own"
        )

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        return vector.view(1, -1, *[1] * self.dimensions)


def _dropped(x: Tensor, probability: float, seed: int, dtype: torch.dtype) -> Tensor:
    cast = x.to(dtype)
    if not probability:
        return cast
    return cast * keep_mask(x.shape, probability, seed, x.device, dtype).mul_(keep_scale(probability))


class _LeanProduct(torch.autograd.Function):
    """``Convolution._compose`` of a cast, dropped ``x`` that keeps ``x`` itself alone, and computes again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        probability: float,
        dtype: torch.dtype,
        host: Convolution,
        module: nn.Module,
    ) -> Tensor:
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.settings = scaling, probability, dtype, host, module
        ctx.seed = draw_seed() if probability else 0
        with without_autocast(x.device.type):
            return host._compose(module, _dropped(x, probability, ctx.seed, dtype), lora_A, lora_B, scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scaling, probability, dtype, host, module = ctx.settings
        needed = ctx.needs_input_grad[:3]
        differentiable = torch.is_grad_enabled()  # for derivatives of higher order
        with torch.enable_grad(), without_autocast(gradients[0].device.type):
            x, lora_A, lora_B = (
                saved if differentiable else saved.detach().requires_grad_(need)
                for saved, need in zip(ctx.saved_tensors, needed, strict=True)
            )
            output = host._compose(module, _dropped(x, probability, ctx.seed, dtype), lora_A, lora_B, scaling)
            inputs = [tensor for tensor, need in zip((x, lora_A, lora_B), needed, strict=True) if need]
            found = iter(torch.autograd.grad(output, inputs, gradients[0], create_graph=differentiable))
        return *(next(found) if need else None for need in needed), None, None, None, None, None
