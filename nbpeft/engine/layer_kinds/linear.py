"""nn.Linear and the quantized layers that replace it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_layer_kind


@register_layer_kind
class Linear:
    """The weight is (out, in)."""

    name = "linear"
    peft_name = "Linear"
    priority = 0
    is_linear = True
    takes_ids = False

    def matches(self, module: nn.Module) -> bool:
        if isinstance(module, nn.Linear):
            return True
        features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        return all(isinstance(count, int) for count in features)

    def features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def weight_shape(self, module: nn.Module) -> tuple[int, ...]:
        in_features, out_features = self.features(module)
        return out_features, in_features

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        return vector
