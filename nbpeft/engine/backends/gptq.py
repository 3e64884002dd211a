"""GPTQ layers of gptqmodel (which also runs AWQ checkpoints) and auto_gptq. Not tested."""

from __future__ import annotations

from torch import nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import NEEDS_CALIBRATION, ReadOnlyWeight, loaded


@register_backend
class Gptq(ReadOnlyWeight):
    """Every quantized linear layer of the two libraries."""

    name = "gptq"
    unmergeable_reason = NEEDS_CALIBRATION

    def matches(self, module: nn.Module) -> bool:
        """Whether the layer's class derives from gptqmodel's, or comes from auto_gptq."""
        if isinstance(module, loaded("gptqmodel.nn_modules.qlinear", "BaseQuantLinear")):
            return True
        return type(module).__module__.startswith("auto_gptq.") and hasattr(module, "qweight")
