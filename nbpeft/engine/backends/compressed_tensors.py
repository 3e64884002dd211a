"""compressed-tensors layers that stay compressed (``weight_packed`` or 8-bit ``weight`` with scales).

transformers 5 decompresses while loading: such layers are dense. Written against the interface, not tested.
"""

from __future__ import annotations

from torch import nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import ReadOnlyWeight


@register_backend
class CompressedTensors(ReadOnlyWeight):
    """A linear layer with a ``quantization_scheme`` whose weight is stored compressed."""

    name = "compressed-tensors"
    priority = 110
    unmergeable_reason = (
        "its scheme is fixed by a recipe; keep the adapter unmerged, or merge into a decompressed copy of the base"
    )

    def matches(self, module: nn.Module) -> bool:
        """Whether the layer has a scheme and no dense weight."""
        if getattr(module, "quantization_scheme", None) is None:
            return False
        weight = module._parameters.get("weight")
        return weight is None or not weight.is_floating_point() or weight.element_size() == 1
