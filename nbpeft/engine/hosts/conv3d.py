"""nn.Conv3d."""

from __future__ import annotations

from nbpeft.engine.convolution import Convolution
from nbpeft.engine.registry import register_host


@register_host
class Conv3d(Convolution):
    """A convolution over 3 dimensions."""

    name = "convolution3d"
    dimensions = 3
