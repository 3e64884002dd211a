"""EETQ layers: int8 weights in the layout of a GPU kernel. Written against the interface, not tested."""

from __future__ import annotations

from torch import nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import ReadOnlyWeight, loaded


@register_backend
class Eetq(ReadOnlyWeight):
    """``EetqLinear`` of eetq and of transformers."""

    name = "eetq"
    unmergeable_reason = (
        "its layout belongs to a GPU kernel; keep the adapter unmerged, or merge into a full-precision copy of the base"
    )

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is an EETQ linear layer."""
        known = loaded("eetq", "EetqLinear") + loaded("transformers.integrations.eetq", "EetqLinear")
        return isinstance(module, known)
