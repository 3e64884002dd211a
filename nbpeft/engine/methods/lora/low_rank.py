"""The low-rank product B A on each kind of layer.

    linear        A (r, in), B (out, r)
    attention     A (r, embed), B (3 embed, r), of query, key and value together
    embedding     A (r, vocabulary), B (features, r); the input is ids, so there is no dropout. A starts at zero and B
                  random: a lookup gives a gradient only to the columns of A that were looked up
    convolution   A (r, in, *kernel), B (out, r / groups, 1, …): A is a convolution with the layer's stride,
                  padding and dilation, B one with kernel 1 and the layer's groups
    parameter     A (experts * r, in), B (out, r * experts): a product for each expert

A of a grouped convolution sees all input channels, as in PEFT's files. The product is then not a weight of the layer
and cannot be merged. DoRA takes its norms all the same, in the shape that PEFT gives it.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.contract.base import LayerKind
from nbpeft.engine.kernels.numerics import add_delta, composes, compute_dtype, fits, without_autocast
from nbpeft.engine.layer_kinds.attention import Attention
from nbpeft.engine.layer_kinds.convolution import Convolution
from nbpeft.engine.layer_kinds.embedding import Embedding
from nbpeft.engine.layer_kinds.parameter import Parameter, ParameterView
from nbpeft.engine.methods.lora.autograd import Factors
from nbpeft.engine.methods.lora.dropout import Dropout, KeepMask
from nbpeft.engine.methods.lora.products import low_rank_linear
from nbpeft.errors import ConfigError, LayerKindError, MergeError

FactorShapes = tuple[tuple[int, ...], tuple[int, ...]]

_MERGED_AT_ONCE = 1 << 18
"""Elements of a weight that are merged at a time in another dtype: what a processor's cache holds."""


class LowRank:
    """The product on a linear layer; base class of the products on other kinds of layer.

    Args:
        kind: the kind of layer.
    """

    factor_names = ("lora_A", "lora_B")
    zero_init_factor = 1
    """Index of the factor that is initialized with zeros by default: 1 (B), or 0 (A, for embeddings)."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def shapes(self, module: nn.Module, rank: int) -> FactorShapes:
        """Shapes of A and B for a rank.

        Raises:
            ConfigError: the layer does not support that rank.
        """
        in_features, out_features = self.kind.features(module)
        return (rank, in_features), (out_features, rank)

    def forward(
        self, module: nn.Module, x: Tensor, factors: Factors, dropout: Dropout, onto: Tensor | None = None
    ) -> Tensor:
        """``scaling * B(A(dropout(x)))`` without a bias.

        Args:
            module: the frozen layer.
            x: its input.
            factors: A and B, shaped as in ``shapes``, and their scaling.
            dropout: dropout of the input.
            onto: tensor to add the product to, shaped like the layer's output.

        Returns:
            A tensor shaped like the layer's output, in the dtype of ``onto`` if that is given.
        """
        lora_A, probability = factors[0], dropout.active_probability
        if x.device != lora_A.device:
            x = x.to(lora_A.device)
        if probability < 1.0 and not composes():
            return self._in_one(module, x, factors, probability, onto)
        # Compilers and function transforms trace plain operations.
        x = x.to(lora_A.dtype)
        delta = self.compose(module, F.dropout(x, probability) if probability else x, factors)
        return delta if onto is None else add_delta(onto, delta)

    def _in_one(
        self, module: nn.Module, x: Tensor, factors: Factors, probability: float, onto: Tensor | None
    ) -> Tensor:
        """The product by a function that saves little for backward."""
        return low_rank_linear(x, factors, probability, onto)

    def compose(self, module: nn.Module, x: Tensor, factors: Factors) -> Tensor:
        """``scaling * B(A(x))`` by plain operations in PEFT's order, in the dtype of ``x``."""
        lora_A, lora_B, scaling = factors
        return self.up(module, self.down(module, x, lora_A.to(x.dtype)), lora_B.to(x.dtype), None) * scaling

    has_steps: ClassVar[bool] = True
    """Whether ``up`` of ``down`` is the product."""

    def down(self, module: Any, x: Tensor, lora_A: Tensor) -> Tensor:
        """The first step: A times the input after cast and dropout."""
        return F.linear(x, lora_A)

    def up(self, module: Any, hidden: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
        """The second step: B times the result of the first, plus a bias (out,)."""
        return F.linear(hidden, lora_B, bias)

    def product(self, module: nn.Module, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """B A as a canonical weight.

        Raises:
            MergeError: the product is not a weight of the layer, see ``no_product_reason``.
        """
        return lora_B @ lora_A

    def normed_product(self, module: nn.Module, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """The change of the weight in DoRA's row norms: ``product``, or PEFT's substitute for it."""
        return self.product(module, lora_A, lora_B)

    def no_product_reason(self, module: nn.Module) -> str:
        """Why B A cannot be merged into the weight of this layer; empty if it can."""
        return ""


class LowRankLookup(LowRank):
    """The product on an embedding."""

    factor_names = ("lora_embedding_A", "lora_embedding_B")
    zero_init_factor = 0
    has_steps = False

    def shapes(self, module: nn.Module, rank: int) -> FactorShapes:
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, Tensor) and scale.numel() != 1:
            raise ConfigError(f"an embedding whose embed_scale has shape {tuple(scale.shape)} cannot be adapted")
        return super().shapes(module, rank)

    def forward(
        self, module: nn.Module, x: Tensor, factors: Factors, dropout: Dropout, onto: Tensor | None = None
    ) -> Tensor:
        """The product for ids (…,): (…, features)."""
        lora_A, lora_B, scaling = factors
        dtype = compute_dtype(lora_A, lora_A)
        hidden = self.down(module, x.to(lora_A.device), lora_A).to(dtype)
        delta = self.up(module, hidden * scaling, lora_B.to(dtype), None)
        return delta if onto is None else add_delta(onto, delta)

    def down(self, module: Any, x: Tensor, lora_A: Tensor) -> Tensor:
        """The first step: the columns of A for ids."""
        return self.kind.look_up(module, x, lora_A.T)

    def up(self, module: Any, hidden: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(hidden, lora_B, bias) * self.kind.output_scale(module, hidden.dtype)


class LowRankConvolution(LowRank):
    """The product on a convolution."""

    def shapes(self, module: Any, rank: int) -> FactorShapes:
        """Shapes of A and B."""
        if rank % module.groups:
            raise ConfigError(
                f"a {type(module).__name__} with {module.groups} groups cannot take rank {rank}: "
                f"choose a multiple of {module.groups}, or exclude it",
                rank=rank,
                groups=module.groups,
            )
        ones = (1,) * self.kind.dimensions
        return (
            (rank, module.in_channels, *module.kernel_size),
            (module.out_channels, rank // module.groups, *ones),
        )

    def _in_one(
        self, module: nn.Module, x: Tensor, factors: Factors, probability: float, onto: Tensor | None
    ) -> Tensor:
        """The product for (batch, in, *space): (batch, out, *space')."""
        dtype = compute_dtype(x, factors[0])
        if torch.is_grad_enabled() and (probability or x.dtype != dtype):
            delta: Tensor = _LeanProduct.apply(x, *factors, probability, dtype, self, module)
        else:
            delta = self.compose(module, _dropped(x, probability, dtype)[0], factors)
        return delta if onto is None else add_delta(onto, delta)

    def compose(self, module: nn.Module, x: Tensor, factors: Factors) -> Tensor:
        """``B(scaling * A(x))`` in the dtype of ``x``: between the factors there are fewer values to multiply."""
        lora_A, lora_B, scaling = factors
        return self.up(module, self.down(module, x, lora_A.to(x.dtype)) * scaling, lora_B.to(x.dtype), None)

    def down(self, module: Any, x: Tensor, lora_A: Tensor) -> Tensor:
        """The first step: a convolution with the layer's settings."""
        return self.kind.convolve(module, x, lora_A, groups=1)

    def up(self, module: Any, hidden: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
        """The second step: a convolution with kernel 1."""
        output: Tensor = self.kind.pointwise(hidden, lora_B, groups=module.groups)
        return output if bias is None else output + self.kind.per_channel(module, bias)

    def product(self, module: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """B A as a canonical weight (out, in, *kernel)."""
        refusal = self.no_product_reason(module)
        if refusal:
            raise MergeError(refusal)
        return self.normed_product(module, lora_A, lora_B)

    def normed_product(self, module: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """The product in the shape of the weight; for a grouped convolution with B viewed as (…, r), as in PEFT."""
        return (lora_B.reshape(-1, lora_A.shape[0]) @ lora_A.flatten(1)).view(module.weight.shape)

    def no_product_reason(self, module: Any) -> str:
        if module.groups == 1:
            return ""
        return (
            f"a {type(module).__name__} with {module.groups} groups: the adapter sees all input channels, "
            "a group of the layer only its own"
        )


class LowRankParameter(LowRank):
    """The products on a bare parameter, one for each of its n matrices: A (n * r, in), B (out, r * n)."""

    has_steps = False

    def shapes(self, module: Any, rank: int) -> FactorShapes:
        in_features, out_features = self.kind.features(module)
        return (rank * module.count, in_features), (out_features, rank * module.count)

    def factors(self, module: ParameterView, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Views of A and B whose product (…, rows, columns) is the change of the parameter."""
        if len(module.shape) == 2:
            return lora_B, lora_A
        right = lora_A.reshape(module.count, -1, lora_A.shape[1])
        left = lora_B.reshape(lora_B.shape[0], -1, module.count).permute(2, 0, 1)
        return (right.transpose(1, 2), left.transpose(1, 2)) if module.is_transposed else (left, right)

    def product(self, module: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        left, right = self.factors(module, lora_A, lora_B)
        return left @ right


def add_product_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, factor: float) -> None:
    """Adds ``factor * B A`` to a matrix in place; in another dtype some rows at a time, each rounded once.

    Args:
        weight: (out, in).
        lora_A: (r, in).
        lora_B: (out, r).
        factor: factor on the product.
    """
    if weight.dtype == lora_A.dtype and fits(factor, weight.dtype):
        weight.addmm_(lora_B, lora_A, alpha=factor)
        return
    dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    factor = factor if fits(factor, dtype) else factor * math.inf
    # One buffer for all rows: fresh memory costs more than the arithmetic.
    count = max(1, min(weight.shape[0], _MERGED_AT_ONCE // max(1, weight.shape[1])))
    buffer = torch.empty(count, weight.shape[1], dtype=dtype, device=weight.device)
    for rows, left in zip(weight.split(count), lora_B.split(count), strict=True):
        rows.copy_(buffer[: len(rows)].copy_(rows).addmm_(left, lora_A, alpha=factor))


_BY_KIND: dict[LayerKind, LowRank] = {}


def low_rank_of(kind: LayerKind) -> LowRank:
    """The product on a kind of layer.

    Raises:
        LayerKindError: LoRA does not support that kind.
    """
    if kind not in _BY_KIND:
        _BY_KIND[kind] = _made_for(kind)
    return _BY_KIND[kind]


def _made_for(kind: LayerKind) -> LowRank:
    if kind.is_linear or isinstance(kind, Attention):
        return LowRank(kind)
    if isinstance(kind, Embedding):
        return LowRankLookup(kind)
    if isinstance(kind, Convolution):
        return LowRankConvolution(kind)
    if isinstance(kind, Parameter):
        return LowRankParameter(kind)
    raise LayerKindError(f"LoRA does not work on layers of the kind {kind.name!r}", kind=kind.name)


def _dropped(x: Tensor, probability: float, dtype: torch.dtype) -> tuple[Tensor, KeepMask | None]:
    """The input cast to a dtype and with dropout, and the dropout's mask."""
    if not probability:
        return x.to(dtype), None
    keep, mask = KeepMask.drawn(x, probability)
    return x.to(dtype) * keep.noise(mask, dtype), keep


class _LeanProduct(torch.autograd.Function):
    """``LowRankConvolution.compose`` after cast and dropout, which saves only ``x`` and recomputes in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        probability: float,
        dtype: torch.dtype,
        maths: LowRankConvolution,
        module: nn.Module,
    ) -> Tensor:
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.settings = scaling, dtype, maths, module
        dropped, ctx.keep = _dropped(x, probability, dtype)
        with without_autocast(x.device.type):
            return maths.compose(module, dropped, (lora_A, lora_B, scaling))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scaling, dtype, maths, module = ctx.settings
        needed = ctx.needs_input_grad[:3]
        differentiable = torch.is_grad_enabled()  # for derivatives of higher order
        with torch.enable_grad(), without_autocast(gradients[0].device.type):
            x, lora_A, lora_B = (
                saved if differentiable else saved.detach().requires_grad_(need)
                for saved, need in zip(ctx.saved_tensors, needed, strict=True)
            )
            dropped = x.to(dtype)
            if ctx.keep is not None:
                dropped = dropped * ctx.keep.noise(ctx.keep.again(), dtype)
            output = maths.compose(module, dropped, (lora_A, lora_B, scaling))
            inputs = [tensor for tensor, need in zip((x, lora_A, lora_B), needed, strict=True) if need]
            found = iter(torch.autograd.grad(output, inputs, gradients[0], create_graph=differentiable))
        return *(next(found) if need else None for need in needed), None, None, None, None, None
