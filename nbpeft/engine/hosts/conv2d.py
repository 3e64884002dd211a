"""nn.Conv2d."""

from __future__ import annotations

from nbpeft.engine.convolution import Convolution
from nbpeft.engine.registry import register_host


@register_host
class Conv2d(Convolution):
    """A convolution over 2 dimensions."""

    name = "convolution2d"
    dimensions = 2
