"""transformers' ``EetqLinear``, whose features are known only from the shape of its weight, (in, out)."""

from __future__ import annotations

from torch import nn

from nbpeft.engine.contract.registry import register_layer_kind
from nbpeft.engine.kernels.storage import loaded
from nbpeft.engine.layer_kinds.conv1d import TransformersConv1D


@register_layer_kind
class EetqLinear(TransformersConv1D):
    """As a linear layer with the stored weight transposed."""

    name = "eetq_linear"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, loaded("transformers.integrations.eetq", "EetqLinear"))
