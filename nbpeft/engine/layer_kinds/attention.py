"""nn.MultiheadAttention, which stores the projections of query, key and value in one parameter, (3 embed, embed).

It reads this parameter and the weight of ``out_proj``, but never calls ``out_proj``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nbpeft.engine.contract.base import Composite
from nbpeft.engine.contract.registry import register_layer_kind
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.errors import LayerKindError


@register_layer_kind
class Attention(Composite):
    """The canonical weight is ``in_proj_weight``, unchanged."""

    name = "attention"
    peft_name = "MultiheadAttention"
    parameter = "in_proj_weight"
    layers = ("out_proj",)
    private = ("_qkv_same_embed_dim",)  # nn.TransformerEncoderLayer
    priority = 20
    is_linear = False
    takes_ids = False

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    def refusal(self, module: Any) -> str:
        if module.in_proj_weight is None:
            return (
                f"its keys have {module.kdim} features and its values {module.vdim}, its queries {module.embed_dim}: "
                "only the same embed for query/key/value is supported, or q_proj_weight, k_proj_weight and "
                "v_proj_weight in target_parameters"
            )
        if not isinstance(module.out_proj, nn.Module) or not hasattr(module.out_proj, "weight"):
            return "its out_proj is not a layer"
        return ""

    def features(self, module: Any) -> tuple[int, int]:
        out_features, in_features = self.weight_shape(module)
        return in_features, out_features

    def weight_shape(self, module: Any) -> tuple[int, ...]:
        weight = module.weight if isinstance(module, ParameterView) else module.in_proj_weight
        return (0, 0) if weight is None else tuple(weight.shape)

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Always raises LayerKindError: query, key and value have different inputs."""
        raise LayerKindError("the projections of an attention cannot be applied separately", kind=self.name)

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        return vector
