"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b + s * B A dropout(x)          A: (r, in), B: (out, r)
    s = alpha / r, with rsLoRA (arXiv:2312.03732) alpha / sqrt(r)

W and b stay frozen; A starts random and B at zero, so training starts at the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from nbpeft.engine.adapter import IsLowRank, LowRankDelta, ReplacesCall, ServesRows
from nbpeft.engine.base import BaseLayer
from nbpeft.engine.methods.lora.attention import AttentionLoRA
from nbpeft.engine.methods.lora.autograd import Dropout, adapted_linear
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.family import FAMILY
from nbpeft.engine.methods.lora.multi_adapter import factor_rows
from nbpeft.engine.methods.lora.parameters import ParameterLoRA
from nbpeft.engine.methods.lora.plain import PlainLowRank
from nbpeft.engine.numerics import composes
from nbpeft.engine.registry import register


def _variant(config: LoraConfig) -> str:
    """A name more exact than LoRA, or empty."""
    name = "rsLoRA" if config.use_rslora else ""
    return f"quantization-aware {name or 'LoRA'}" if config.quantization_aware else name


@register(
    LoraConfig,
    label="LoRA",
    when="the usual choice: every tool and every server takes it",
    paper="arXiv:2106.09685",
    applies=lambda config: not config.variant,
    variant=_variant,
    sample_configs={
        "plain": {"r": 4, "lora_alpha": 8},
        "rslora": {"r": 4, "use_rslora": True},
        "bias": {"r": 4, "lora_bias": True},
        "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
        "olora": {"r": 4, "init_lora_weights": "olora"},
        "pissa": {"r": 4, "init_lora_weights": "pissa"},
    },
    kind_classes={"parameter": ParameterLoRA, "attention": AttentionLoRA},
    **FAMILY,
)
class LoRA(PlainLowRank, ReplacesCall, ServesRows, IsLowRank):
    """A LoRA adapter on one layer."""

    supports_fused_add: ClassVar[bool] = True

    def output(self, x: Tensor, base: BaseLayer) -> Tensor | None:
        """What an ordinary linear layer and the product give, in one function; see ``ReplacesCall``."""
        layer = base.module
        if composes():  # and the compiler finds nothing here to guard
            return None
        if type(layer) is not nn.Linear or base.backend.name != "dense" or type(layer.weight).__name__ == "DTensor":
            return None
        if self.observed is not None or self.output_bias is not None or self.initial is not None:
            return None
        dropout = Dropout(self.dropout, self.training)
        return adapted_linear(x, layer.weight, layer.bias, *self.trained_factors, self.scaling, dropout)

    @classmethod
    def mixed(
        cls, adapters: Sequence[Any], scales: Sequence[float], base: BaseLayer, kept: dict[Any, Any]
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Two batched products on linear layers; see ``ServesRows``."""
        if not base.kind.is_linear:
            return None
        if any(adapter is not None and (adapter.output_bias is not None or adapter.observed) for adapter in adapters):
            return None
        if "served" not in kept:
            entries = [
                None if adapter is None else (*adapter.factors, float(adapter.scaling) * scale)
                for adapter, scale in zip(adapters, scales, strict=True)
            ]
            kept["served"] = factor_rows(entries, base.device)
        return kept["served"]  # type: ignore[no-any-return]

    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """A, B and their scaling; see ``IsLowRank``."""
        lora_A, lora_B = self.detached_factors
        if self.padded:
            used = lora_A.flatten(1).any(1) | lora_B.transpose(0, 1).flatten(1).any(1)
            used[0] = True
            lora_A, lora_B = lora_A[used], lora_B[:, used]
        return LowRankDelta(lora_A, lora_B, float(self.scaling), self.delta_bias(base))
