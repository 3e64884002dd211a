"""Widgets without a front end: outputs are recorded, and every widget has to be closed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import IPython.display
import pytest

from tests.widgets.support import Output, live_widgets


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """What is displayed, in order; each output keeps all that was shown in its place."""
    shown: list[Output] = []

    def display(bundle: dict[str, Any], *, raw: bool, display_id: bool) -> Output:
        assert raw and display_id
        shown.append(Output(bundle))
        return shown[-1]

    monkeypatch.setattr(IPython.display, "display", display)
    return shown


@pytest.fixture(autouse=True)
def only_widgets_of_every_front_end() -> Iterator[None]:
    """Fails where a test makes a widget that some front end lacks.

    VS Code and Colab carry the controls of ipywidgets; they load other packages' from a CDN, which may be blocked, and
    VS Code does not support ``Output``.
    """
    from ipywidgets import Widget

    made: dict[str, str] = {}
    Widget.on_widget_constructed(lambda widget: made.update({type(widget).__name__: widget._model_module}))
    yield
    Widget.on_widget_constructed(None)
    everywhere = ("@jupyter-widgets/base", "@jupyter-widgets/controls")
    assert {name: module for name, module in made.items() if module not in everywhere} == {}


@pytest.fixture
def no_widget_stays() -> Iterator[None]:
    """Fails where a test leaves widgets behind."""
    from nbpeft.widgets import training_panel

    before = set(live_widgets())
    yield
    training_panel.close_views()
    left = [type(widget).__name__ for key, widget in live_widgets().items() if key not in before]
    assert left == []
