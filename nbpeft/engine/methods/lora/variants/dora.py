"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353).

    y = m * (W + s B A) x / ||W + s B A||_row + b

The magnitude m, (out,), is initialized with the row norms of W, so training starts at the base model. The norm is
detached from the gradient (section 4.3 of the paper). It is computed without building the sum of the matrices:

    ||W + s B A||² = ||W||² + 2 s (W Aᵀ ∘ B) 1 + s² (B (A Aᵀ) ∘ B) 1        (row sums)

``||W||²`` is computed once, since W is frozen. The bias is not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import stamp
from nbpeft.engine.methods.lora.adapter import MAGNITUDE, LowRankAdapter
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.dropout import Dropout, lean_dropout
from nbpeft.engine.methods.lora.family import FAMILY, listing
from nbpeft.engine.methods.lora.initialization.inits import check_init

_NOT_DROPPED = Dropout(0.0, False)
_CANCELLATION = 1e-2
"""If the squared row norm is below this share of its terms, their sum has lost digits to cancellation."""


@register(
    LoraConfig,
    label="DoRA",
    listing=listing(
        when="low ranks: slightly better than LoRA, at slower steps",
        paper="arXiv:2402.09353",
        variant=lambda config: "rsDoRA" if config.use_rslora else "",
        listed_with={"use_dora": True},
    ),
    applies=lambda config: config.variant == "use_dora",
    sample_configs={
        "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
        "dora-pissa": {"r": 4, "use_dora": True, "init_lora_weights": "pissa"},
    },
    **FAMILY,
)
class DoRA(LowRankAdapter):
    """A DoRA adapter on one layer."""

    reads_weight: ClassVar[bool] = True

    _weight_square: tuple[Any, Tensor] | None = None
    _norm: tuple[Any, Tensor] | None = None

    @classmethod
    def parameter_shapes(cls, config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A, B and the magnitude, (out,) with the dimensions of the layer's output."""
        check_init(config, path, module, kind)
        shapes = super().parameter_shapes(config, path, module, kind)
        out_features = kind.features(module)[1]
        shapes[MAGNITUDE] = tuple(kind.per_channel(module, torch.empty(out_features, device="meta")).shape)
        return shapes

    @classmethod
    def create(cls, config: LoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded tensors or makes new ones, with the magnitude set to the current norm."""
        adapter = super().create(config, site, tensors)
        if tensors is None:
            start = adapter._start
            if start.quantized is None:
                norm = adapter.row_norm(site.base)
            else:
                weight = site.base.kind.canonical(site.base.module, start.quantized.dequantize())
                norm = adapter._exact_norm(weight, site.base, torch.float32)
            adapter.bind({MAGNITUDE: norm.to(site.dtype).view(site.shapes[MAGNITUDE])})
        return adapter

    @torch.no_grad()
    def row_norm(self, base: BaseLayer, *, learning: bool = False) -> Tensor:
        """``||W + s B A||`` per output channel, (out,), in at least float32, detached.

        Outside of training and compiled code the norm is cached until a factor or the weight changes.

        Args:
            base: the layer.
            learning: compute the norm again, since the factors are being trained.
        """
        if torch.compiler.is_compiling():
            return self._compute_norm(base)
        if self.training or learning:
            # Fused and 8-bit optimizers do not bump `_version`, so a cached norm cannot be trusted.
            self._norm = None
            return self._compute_norm(base)
        trained = (stamp(factor.detach(), deep=True) for factor in self.trained_factors)
        scaling = stamp(self.scaling) if isinstance(self.scaling, Tensor) else self.scaling
        now = (*trained, _weight_stamp(base), scaling)
        if self._norm is None or self._norm[0] != now or now[0] is None:
            self._norm = (now, self._compute_norm(base))
        return self._norm[1]

    def _compute_norm(self, base: BaseLayer) -> Tensor:
        lora_A, lora_B = self.detached_factors
        weight = base.weight()
        rows = weight.flatten(1)
        flat_A, flat_B = lora_A.flatten(1), lora_B.flatten(1)
        dtype = torch.promote_types(lora_A.dtype, torch.float32)
        if rows.shape[1] != flat_A.shape[1]:
            return self._exact_norm(weight, base, dtype)
        flat_A, flat_B = flat_A.to(dtype), flat_B.to(dtype) * self.scaling
        square = self._square(rows, base, dtype)
        cross = 2 * ((rows.to(dtype) @ flat_A.T) * flat_B).sum(1)
        own = ((flat_B @ (flat_A @ flat_A.T)) * flat_B).sum(1)
        total = square + cross + own
        # Where the terms nearly cancel, the sum has lost its digits. Elsewhere ``any()`` would wait for the device, and
        # compiled code cannot branch on it.
        if total.device.type == "cpu" and not torch.compiler.is_compiling():
            lost = total < _CANCELLATION * (square + own)
            if bool(lost.any()):
                summed = rows[lost].to(dtype) + flat_B[lost] @ flat_A
                total[lost] = summed.square().sum(1)
        return total.clamp_min(0).sqrt()

    def _exact_norm(self, weight: Tensor, base: BaseLayer, dtype: torch.dtype) -> Tensor:
        lora_A, lora_B = (factor.detach().to(dtype) for factor in self.factors)
        summed = weight.to(dtype) + self.low_rank.normed_product(base.module, lora_A, lora_B) * self.scaling
        return summed.flatten(1).norm(dim=1)

    def _square(self, rows: Tensor, base: BaseLayer, dtype: torch.dtype) -> Tensor:
        """``||W||²`` per row, (out,), cached as long as the weight is the same."""
        if torch.compiler.is_compiling():
            return rows.to(dtype).square().sum(1)
        now = _weight_stamp(base)
        if self._weight_square is None or self._weight_square[0] != now or now is None:
            self._weight_square = (now, rows.to(dtype).square().sum(1))
        return self._weight_square[1]

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``m / ||W + s B A|| * (W + s B A) x - W x``."""
        factors = (*self.factors, self.scaling)
        kind, module = base.kind, base.module
        magnitude = self.tensor(MAGNITUDE)
        assert magnitude is not None
        norm = self.row_norm(base, learning=torch.is_grad_enabled() and magnitude.requires_grad)
        scale = kind.per_channel(module, magnitude.view(-1) / norm.clamp_min(torch.finfo(norm.dtype).tiny))
        dropout, whole = Dropout(self.dropout, self.training and x.is_floating_point()), x
        if dropout.is_active:
            x = lean_dropout(x.to(factors[0].dtype), dropout)
            plain = kind.apply(module, x, base.weight().to(x.dtype))
        else:
            bias = base.bias
            plain = base_output if bias is None else base_output - kind.per_channel(module, bias)
        low = self.low_rank.forward(module, x, factors, _NOT_DROPPED)
        delta = scale * (plain + low) - plain
        if dropout.is_active and self.initial is not None:
            # The base contains the initial component for the dropped part of the input as well: subtract it there, too.
            left = whole.to(x.dtype) - x
            delta = delta + self.low_rank.forward(module, left, (*self.initial, self.scaling), _NOT_DROPPED)
        return delta

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``m / ||W + s B A|| * (W + s B A) - W``, shaped like the canonical weight."""
        magnitude = self.tensor(MAGNITUDE)
        assert magnitude is not None
        whole = weight.to(self.trained_factors[0].dtype)
        summed = whole + super().delta_weight(weight, base)
        norm = summed.flatten(1).norm(dim=1)
        scale = magnitude.detach().view(-1) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return summed.mul_(scale.view(-1, *[1] * (summed.ndim - 1))).sub_(whole)

    def reset_(self, base: BaseLayer) -> None:
        """Sets the factors to zero and the magnitude to the norm of the weight."""
        super().reset_(base)
        self.set_row_scale_(None, base)

    def row_scale(self, base: BaseLayer) -> Tensor | None:
        """``m / ||W + s B A||``."""
        return self.get_parameter(MAGNITUDE).detach().view(-1) / self.row_norm(base)

    @torch.no_grad()
    def set_row_scale_(self, row_scale: Tensor | None, base: BaseLayer) -> None:
        """Sets the magnitude so that ``row_scale`` is the given tensor, (out,)."""
        magnitude, norm = self.get_parameter(MAGNITUDE), self.row_norm(base)
        magnitude.copy_((norm if row_scale is None else norm * row_scale).view(magnitude.shape))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_weight_square": None, "_norm": None}


def _weight_stamp(base: BaseLayer) -> Any:
    weight = getattr(base.module, "weight", None)
    return stamp(weight) if isinstance(weight, Tensor) else None
