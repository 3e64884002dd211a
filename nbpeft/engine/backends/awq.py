"""AWQ layers of autoawq: 4-bit codes with zero points and scales per group.

Written against autoawq's interface, not tested: the CPU path of autoawq 0.2.7 does not run, so reading the weight
needs its GPU kernels.
"""

from __future__ import annotations

from torch import nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.storage import NEEDS_CALIBRATION, ReadOnlyWeight


@register_backend
class Awq(ReadOnlyWeight):
    """``awq.modules.linear.WQLinear_*``."""

    name = "awq"
    unmergeable_reason = NEEDS_CALIBRATION

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is one of autoawq's linear layers, for any kernel."""
        kind = type(module)
        return kind.__module__.startswith("awq.") and kind.__name__.startswith("WQLinear")
