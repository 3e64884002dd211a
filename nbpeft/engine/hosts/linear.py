"""nn.Linear and every quantized layer that takes its place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.adapter import Dropout
from nbpeft.engine.lowrank import low_rank_linear
from nbpeft.engine.registry import register_host


@register_host
class Linear:
    """A (r, in), B (out, r); the weight is (out, in)."""

    name = "linear"
    priority = 0
    factor_names = ("lora_A", "lora_B")
    zero_factor = 1
    multiplies = True

    def matches(self, module: nn.Module) -> bool:
        if isinstance(module, nn.Linear):
            return True
        features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        return all(isinstance(count, int) for count in features)

    def features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def factor_shapes(self, module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        in_features, out_features = self.features(module)
        return (rank, in_features), (out_features, rank)

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
        return low_rank_linear(x, lora_A, lora_B, scaling, dropout, onto)

    def linear(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def product(self, module: nn.Module, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return lora_B @ lora_A

    def product_refusal(self, module: nn.Module) -> str:
        return ""

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        return vector
