"""Shows panels: widgets where they work, HTML or text where they do not."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from nbpeft.magics.desk import Desk
from nbpeft.magics.front_end import has_widgets
from nbpeft.session import Session, StatusReport
from nbpeft.state import SessionState

_hinted = False


def kind_of_display(desk: Desk) -> str:
    """``widgets``, ``html`` or ``text``: what was asked for, or what works here."""
    if desk.ui != "auto":
        return desk.ui
    if not desk.interactive:
        return "text"
    return "widgets" if has_widgets() else "html"


def adapters_panel(desk: Desk, name: str | None) -> object:
    """The adapters panel of a model, or its state where there are no widgets.

    Args:
        desk: the notebook.
        name: the model; None for the current one.
    """
    model = desk.session.model(name)
    chosen = name or desk.session.state.current or "model"
    del model
    if kind_of_display(desk) == "widgets" and has_widgets() and importlib.util.find_spec("nbpeft.widgets") is not None:
        from nbpeft.widgets import AdaptersPanel

        return AdaptersPanel(desk.session, chosen)
    hint_once(desk)
    return status_of(desk.session, chosen)


def status_of(session: Session, name: str | None = None) -> StatusReport:
    """The state of all models, or of one."""
    state = session.state
    if name is None:
        return StatusReport(state)
    models = tuple(model for model in state.models if model.name == name)
    return StatusReport(SessionState(models, name, state.busy, state.revision, state.notes))


def show_run(desk: Desk, run: Any, model_name: str) -> None:
    """Shows a run that starts, live; a terminal gets no live view, its result says how it went."""
    if kind_of_display(desk) == "text":
        return
    hint_once(desk)
    from nbpeft.widgets import show_run as show

    show(run, desk.session, model_name)


def hint_once(desk: Desk) -> None:
    """Says once how to get buttons, where only ipywidgets is missing for them."""
    global _hinted
    if _hinted or not desk.interactive or desk.ui in ("html", "text") or has_widgets():
        return
    _hinted = True
    print(f"for panels with buttons: {sys.executable} -m pip install ipywidgets", file=sys.stderr)
