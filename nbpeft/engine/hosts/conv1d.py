"""nn.Conv1d."""

from __future__ import annotations

from nbpeft.engine.convolution import Convolution
from nbpeft.engine.registry import register_host


@register_host
class Conv1d(Convolution):
    """A convolution over 1 dimension."""

    name = "convolution1d"
    dimensions = 1
