"""Panels and reports; the widgets package is imported when the first one is shown."""

from __future__ import annotations

from typing import Any

from nbpeft.magics.comparing import tokenizer_source
from nbpeft.magics.desk import Desk
from nbpeft.session import Session, StatusReport


def adapters_panel(desk: Desk, name: str | None) -> object:
    """The adapters panel of a model.

    Args:
        desk: the notebook.
        name: the model; None for the current one.

    Raises:
        AdapterError: there is no such model.
    """
    desk.session.model(name)
    from nbpeft.widgets import AdaptersPanel

    return AdaptersPanel(desk.session, name, ui=desk.ui, tokenizer=tokenizer_source(desk))


def show_run(desk: Desk, run: Any, model_name: str) -> None:
    """Shows a run that starts, live."""
    from nbpeft.widgets import show_run as show

    show(run, desk.session, model_name, ui=desk.ui)


def status_of(session: Session) -> StatusReport:
    """The state of all models."""
    return StatusReport(session.state)
