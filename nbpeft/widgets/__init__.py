"""Panels and live views of a notebook: session states in, session commands out.

    show_run(run, session, model_name)     a training run, live, with Stop and Pause
    AdaptersPanel(session, model_name)     the adapters of a model, to switch, save and delete
    close_all()                            closes what is shown, e.g. when the extension is unloaded
    views                                  states as HTML and text, for everything else

Importing this imports neither torch nor ipywidgets.
"""

from __future__ import annotations

from nbpeft.widgets.adapters_panel import AdaptersPanel, close_panels
from nbpeft.widgets.training_panel import RunView, close_views, show_run

__all__ = ["AdaptersPanel", "RunView", "close_all", "show_run"]


def close_all() -> None:
    """Closes every panel and live view of this process; runs go on."""
    close_views()
    close_panels()
