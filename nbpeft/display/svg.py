"""A run's loss curve as an SVG file."""

from __future__ import annotations

from nbpeft.display.charts import NEUTRAL, loss_chart
from nbpeft.state import TrainState


def loss_svg(train: TrainState) -> str:
    """Returns the content of an SVG file with colours that are readable on light and on dark backgrounds."""
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{loss_chart(train, NEUTRAL, fluid=False)}\n'
