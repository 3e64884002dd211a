"""Panels and live views of a notebook: session states in, session commands out.

    show_run(run, session, model_name)     a training run, live, with Stop and Pause
    AdaptersPanel(session, model_name)     the adapters of a model, to switch, save and delete
    views                                  states as HTML and text, for everything else

Importing this imports neither torch nor ipywidgets.
"""

from __future__ import annotations

from nbpeft.widgets.adapters_panel import AdaptersPanel
from nbpeft.widgets.training_panel import RunView, show_run

__all__ = ["AdaptersPanel", "RunView", "show_run"]
