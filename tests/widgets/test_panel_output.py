"""What a panel leaves in a notebook: its last state, and a view of widgets that goes with them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from nbpeft.widgets import AdaptersPanel, aria, close_all
from nbpeft.widgets import panel as panel_module
from nbpeft.widgets.environment import WIDGET_VIEW
from nbpeft.widgets.panel_output import PanelOutput
from tests.waiting import PATIENCE
from tests.widgets.fakes import FakeSession
from tests.widgets.support import Output, walk

pytestmark = pytest.mark.usefixtures("no_widget_stays")


def shown(session: Any, **options: Any) -> AdaptersPanel:
    panel = AdaptersPanel(session, "model", ui="widgets", **options)
    panel._ipython_display_()
    return panel


def settled(panel: AdaptersPanel, output: Output) -> dict[str, Any]:
    """The last bundle, once nothing is on its way."""
    assert panel._output is not None
    while (timer := panel._output._timer) is not None:
        timer.join(PATIENCE)
    return output.last


def test_the_state_is_html_and_the_widgets_have_an_output_of_their_own(outputs: list[Output]) -> None:
    panel = shown(FakeSession())
    state, view = outputs
    assert set(state.last) == {"text/html", "text/plain"} and "orders*" in state.last["text/plain"]
    assert view.last == {WIDGET_VIEW: view.last[WIDGET_VIEW], "text/html": "", "text/plain": ""}
    assert view.last[WIDGET_VIEW]["model_id"] == panel.widget.model_id
    assert panel_module.AGAIN in state.last["text/html"]
    panel.close()


def test_the_state_follows_what_is_clicked(outputs: list[Output]) -> None:
    session: Any = FakeSession()
    panel = shown(session)
    for name in ("sql", "pirate", "sql"):
        session.use(name, model="model")
    assert "sql*" in settled(panel, outputs[0])["text/plain"]
    panel.close()


def test_a_flood_of_states_sends_few_and_the_last_one_twice(
    outputs: list[Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbpeft.widgets.panel_output.INTERVAL", 60.0)
    session: Any = FakeSession()
    panel = shown(session)
    for name in ("sql", "pirate") * 50:
        session.use(name, model="model")
    sent = outputs[0].bundles
    assert len(sent) == 2
    output: Any = panel._output
    for _ in range(2):  # as the timer does
        output._timer.cancel()
        output._send()
    assert "pirate*" in sent[2]["text/plain"]
    assert sent[2] == sent[3] and len(sent) == 4
    assert output._timer is None
    panel.close()


def test_closing_leaves_the_last_state_and_takes_the_widgets_away(outputs: list[Output]) -> None:
    session: Any = FakeSession()
    shown(session)
    session.use("sql", model="model")
    close_all()
    assert "sql*" in outputs[0].last["text/plain"]
    assert outputs[1].last == {"text/html": "", "text/plain": ""}


def test_a_panel_that_is_opened_elsewhere_leaves_a_line(outputs: list[Output]) -> None:
    session: Any = FakeSession()
    shown(session)
    second = shown(session)
    assert outputs[0].last["text/plain"] == panel_module.MOVED
    assert outputs[1].last == {"text/html": "", "text/plain": ""}
    assert WIDGET_VIEW in outputs[3].last
    second._ipython_display_()
    assert outputs[2].last["text/plain"] == panel_module.MOVED
    assert WIDGET_VIEW in outputs[5].last
    second.close()


def test_the_widgets_hide_the_state_by_its_name(outputs: list[Output]) -> None:
    panel = shown(FakeSession())
    style = panel.widget.children[0].value
    (name,) = (kind.removesuffix("-view") for kind in panel.widget._dom_classes if kind.endswith("-view"))
    assert f'class="nbpeft-state {name}"' in outputs[0].last["text/html"]
    assert f".{name}," in style
    panel.close()


def test_the_script_for_screen_readers_comes_with_the_state_and_finds_the_widgets(outputs: list[Output]) -> None:
    panel = shown(FakeSession())
    assert aria.SCRIPT in outputs[0].last["text/html"]
    classes = {name for part in walk(panel.widget) for name in part._dom_classes}
    assert aria.TOGGLES in classes and f".{aria.TOGGLES} button" in aria.SCRIPT
    panel.close()


def test_what_stands_beside_is_in_the_state(outputs: list[Output]) -> None:
    panel = shown(FakeSession())
    panel._parts.side_panel._toggle("Compare answers")
    assert "Compare answers of model" in settled(panel, outputs[0])["text/html"]
    panel._parts.side_panel._toggle("Compare answers")
    assert "Compare answers of model" not in settled(panel, outputs[0])["text/html"]
    panel.close()


def test_nothing_is_sent_before_it_is_shown() -> None:
    output = PanelOutput(lambda: pytest.fail("drawn for nobody"), threading.RLock())
    output.changed()
    output.close()
