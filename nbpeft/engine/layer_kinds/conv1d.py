"""transformers' ``Conv1D``: a linear layer that stores its weight as (in, out) (GPT-2)."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_layer_kind
from nbpeft.engine.layer_kinds.linear import Linear


@register_layer_kind
class TransformersConv1D(Linear):
    """As ``Linear``, with the stored weight transposed."""

    name = "conv1d"
    priority = 10

    def matches(self, module: nn.Module) -> bool:
        pytorch_utils = sys.modules.get("transformers.pytorch_utils")
        return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)

    def features(self, module: nn.Module) -> tuple[int, int]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.T
