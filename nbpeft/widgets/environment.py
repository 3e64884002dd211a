"""What can be shown where this code runs."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from typing import Literal

from nbpeft.widgets.click_delivery import running_kernel

Ui = Literal["auto", "widgets", "html", "text"]
Shown = Literal["widgets", "html", "text"]

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def shown_as(ui: Ui = "auto") -> Shown:
    """How to show something: with widgets, as HTML, or as lines of text.

    Args:
        ui: The requested form; ``auto`` takes the richest that works here.
    """
    if ui == "text" or (running_kernel() is None and ui == "auto"):
        return "text"
    return "widgets" if ui != "html" and has_ipywidgets() else "html"


def has_ipywidgets() -> bool:
    """Whether ipywidgets can be imported; does not import it."""
    return "ipywidgets" in sys.modules or importlib.util.find_spec("ipywidgets") is not None


def widgets_hint() -> str:
    """How to get buttons where ipywidgets is missing, or the empty string."""
    if has_ipywidgets():
        return ""
    return f"For Stop and Pause buttons: {shlex.quote(sys.executable)} -m pip install ipywidgets"
