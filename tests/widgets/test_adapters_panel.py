"""The adapters panel: states in, commands out, and nothing left behind."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from typing import Any

import ipywidgets
import pytest

from nbpeft.errors import AdapterError, AdapterExistsError
from nbpeft.widgets import AdaptersPanel, close_all, show_run
from nbpeft.widgets import panel as panel_module
from nbpeft.widgets.adapter_rows import MOST
from tests.waiting import PATIENCE, wait_until
from tests.widgets.fakes import FakeRun, FakeSession, adapter, model, train_state
from tests.widgets.support import Output, button, labels, live_widgets, parts, text

pytestmark = pytest.mark.usefixtures("no_widget_stays")


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def panel(session: Any) -> Any:
    made = AdaptersPanel(session, "model", ui="widgets")
    assert made.widget is not None
    yield made
    made.close()


def fields(panel: AdaptersPanel) -> list[Any]:
    return parts(panel, ipywidgets.Text)


def measured(panel: AdaptersPanel) -> None:
    """Waits until memory is not measured any more."""
    panel._live._wake.set()  # without the pause between two measurements
    wait_until(lambda: panel._live._thread is None)


def marked(panel: AdaptersPanel) -> list[str]:
    return [part.description for part in parts(panel, ipywidgets.Button) if "nbpeft-on" in part._dom_classes]


def test_it_shows_adapters_and_marks_the_active_one(panel: AdaptersPanel) -> None:
    assert labels(panel)[:4] == ["base", "orders", "pirate", "sql"]
    assert marked(panel) == ["orders"]
    assert "4,884,480" in text(panel)


def test_a_click_asks_the_session_and_the_state_moves_the_mark(panel: AdaptersPanel, session: Any) -> None:
    button(panel, "sql").click()
    assert session.commands == [("use", "sql")]
    assert marked(panel) == ["sql"]
    button(panel, "base").click()
    assert session.commands[-1] == ("use", "base")
    assert marked(panel) == ["base"]


def test_it_never_changes_itself(panel: AdaptersPanel, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "use", lambda names, model: None)
    button(panel, "sql").click()
    assert marked(panel) == ["orders"]


def test_several_active_adapters_are_all_marked(panel: AdaptersPanel, session: Any) -> None:
    session.use(["orders", "sql"], model="model")
    assert marked(panel) == ["orders", "sql"]


def test_delete_asks_back(panel: AdaptersPanel, session: Any) -> None:
    button(panel, "Delete", 1).click()
    assert "Delete pirate?" in text(panel)
    button(panel, "Keep").click()
    assert session.commands == []
    assert "Delete pirate?" not in text(panel)
    button(panel, "Delete", 1).click()
    confirm = button(panel, "Delete", 2)
    assert "nbpeft-danger" in confirm._dom_classes
    confirm.click()
    assert session.commands == [("delete", "pirate")]
    assert labels(panel)[:3] == ["base", "orders", "sql"]
    assert "deleted &#x27;pirate&#x27;" in text(panel)


def test_what_was_deleted_comes_back_by_a_click(panel: AdaptersPanel, session: Any) -> None:
    assert "Undo" not in labels(panel)
    button(panel, "Delete", 1).click()
    button(panel, "Delete", 2).click()
    button(panel, "Undo").click()
    assert session.commands == [("delete", "pirate"), ("undo",)]
    assert labels(panel)[:4] == ["base", "orders", "pirate", "sql"]
    assert "&#x27;pirate&#x27; is back" in text(panel)
    assert "Undo" not in labels(panel), "one click undoes one deletion"


def test_a_message_about_something_else_offers_no_undo(panel: AdaptersPanel, session: Any) -> None:
    button(panel, "Delete", 1).click()
    button(panel, "Delete", 2).click()
    button(panel, "Save").click()
    button(panel, "Save", 1).click()
    assert "saved" in text(panel) and "Undo" not in labels(panel)


def test_another_adapter_is_written_over_by_a_second_click_alone(panel: AdaptersPanel, session: Any) -> None:
    there = "adapters/orders holds another adapter, 'x': choose another folder for 'orders', or replace it"
    session.error = AdapterExistsError(f"{there} (replace=…)")
    button(panel, "Save").click()
    button(panel, "Save", 1).click()
    assert "or replace it<" in text(panel) and "Replace" in labels(panel) and "Undo" not in labels(panel)
    session.error = None
    button(panel, "Replace").click()
    assert session.commands == [("save", "orders", "adapters/orders"), ("replace", "orders", "adapters/orders")]
    assert "saved" in text(panel) and "Replace" not in labels(panel)


def test_unsaved_training_is_marked_in_its_row(panel: AdaptersPanel, session: Any) -> None:
    assert "not saved" not in text(panel)
    session.change("model", adapters=[adapter("orders", unsaved=True), adapter("sql", active=False)])
    assert "not saved" in text(panel) and "inactive" in text(panel)
    session.change("model", adapters=[adapter("sql", active=False, unsaved=True)])
    assert ">not saved<" in text(panel), "and nothing else, so that it is not cut off"


def test_a_double_click_on_delete_deletes_nothing(panel: AdaptersPanel, session: Any) -> None:
    once = button(panel, "Delete")
    once.click()
    once.click()
    assert session.commands == []
    assert "Delete orders?" not in text(panel)


def test_deleting_what_is_not_saved_says_so(panel: AdaptersPanel, session: Any) -> None:
    first, *others = session.models["model"].adapters
    session.change("model", adapters=(dataclasses.replace(first, unsaved=True), *others))
    button(panel, "Delete").click()
    assert "Delete orders? Its training is not saved." in text(panel)


def test_save_asks_for_a_folder(panel: AdaptersPanel, session: Any) -> None:
    before = len(live_widgets())
    button(panel, "Save", 2).click()
    (field,) = fields(panel)
    assert field.value == "adapters/sql" and field.description == "Save to folder"
    field.value = " kept/sql "
    button(panel, "Save", 3).click()
    assert session.commands == [("save", "sql", "kept/sql")]
    assert "saved &#x27;sql&#x27; to kept/sql" in text(panel)
    assert len(live_widgets()) == before
    button(panel, "Save").click()
    button(panel, "Cancel").click()
    assert len(live_widgets()) == before


def test_enter_in_the_field_saves(panel: AdaptersPanel, session: Any) -> None:
    button(panel, "Save").click()
    (field,) = (part for part in fields(panel) if part.description == "Save to folder")
    field.value = "kept"
    field._handle_string_msg(field, {"event": "submit"}, [])
    assert session.commands == [("save", "orders", "kept")]
    assert "saved" in text(panel)


def test_save_without_a_folder_says_so(panel: AdaptersPanel, session: Any) -> None:
    button(panel, "Save").click()
    fields(panel)[0].value = "  "
    button(panel, "Save", 1).click()
    assert session.commands == []
    assert "Give a folder" in text(panel)


def test_memory_is_shown_without_a_click(panel: AdaptersPanel, session: Any) -> None:
    measured(panel)
    assert "optimizer 37.0 MB" in text(panel)
    assert session.measured == 1
    session.use("sql", model="model")
    measured(panel)
    assert session.measured == 2


def test_memory_is_measured_again_and_again_while_something_runs(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbpeft.widgets.live_memory.INTERVAL", 0.001)
    session.busy = "training orders"
    panel = AdaptersPanel(session, "model", ui="widgets")
    assert panel.widget is not None
    wait_until(lambda: session.measured > 5)
    session.busy = ""
    session.publish()
    measured(panel)
    count = session.measured
    session.publish()
    assert session.measured == count
    panel.close()


def test_a_model_that_cannot_be_measured_now_is_measured_later(panel: AdaptersPanel, session: Any) -> None:
    measured(panel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "measure", lambda name: 1 / 0)
        session.use("sql", model="model")
        measured(panel)
    session.use("pirate", model="model")
    measured(panel)
    assert "optimizer 37.0 MB" in text(panel)


def many(count: int) -> Any:
    return FakeSession(model("model", [adapter(f"run-{number:03}", active=number == 150) for number in range(count)]))


def test_of_many_adapters_the_rows_that_are_seen_are_widgets() -> None:
    before = len(live_widgets())
    panel = AdaptersPanel(many(200), "model", ui="widgets")
    assert len([label for label in labels(panel) if label == "Save"]) == MOST
    assert labels(panel)[: MOST + 2] == ["base", *(f"run-{number:03}" for number in range(MOST)), "run-150"]
    assert len(live_widgets()) - before < 160
    assert "12 of 200 adapters" in text(panel)
    (found,) = fields(panel)
    found.value = "RUN-15"
    assert "10 of 10 adapters" in text(panel) and "Show more" not in labels(panel)
    assert labels(panel)[:11] == ["base", *(f"run-15{number}" for number in range(10))]
    found.value = "nothing like it"
    assert "no adapter matches" in text(panel)
    found.value = ""
    button(panel, "Show more").click()
    assert len([label for label in labels(panel) if label == "Save"]) == 3 * MOST
    panel.close()
    assert len(live_widgets()) == before


def test_few_adapters_have_no_filter() -> None:
    panel = AdaptersPanel(many(MOST), "model", ui="widgets")
    assert panel.widget is not None and fields(panel) == []
    panel.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [(AdapterError("no <room> left"), "no &lt;room&gt; left"), (ZeroDivisionError("half"), "ZeroDivisionError: half")],
)
def test_errors_are_shown_and_dismissed(panel: AdaptersPanel, session: Any, error: Exception, words: str) -> None:
    session.error = error
    button(panel, "sql").click()
    assert words in text(panel)
    assert "--jp-error-color1" in text(panel)
    button(panel, "✕").click()
    assert words not in text(panel)


def test_the_next_success_clears_an_error(panel: AdaptersPanel, session: Any) -> None:
    session.error = AdapterError("no")
    button(panel, "sql").click()
    session.error = None
    button(panel, "pirate").click()
    assert "✕" not in labels(panel)


def test_a_busy_session_is_said_to_be_busy(panel: AdaptersPanel, session: Any) -> None:
    session.busy = "training orders"
    session.publish()
    assert "training orders …" in text(panel)
    button(panel, "sql").click()
    assert "busy: training orders" in text(panel)
    assert "--jp-error-color1" not in text(panel)
    session.busy = ""
    session.publish()
    assert "training orders …" not in text(panel)


def test_only_what_changed_is_sent(panel: AdaptersPanel, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(panel)
    sent: list[tuple[str, Any]] = []

    def send_state(self: Any, key: Any = None) -> None:
        sent.append((type(self).__name__, key))

    monkeypatch.setattr(ipywidgets.Widget, "send_state", send_state)
    session.publish()
    session.change("model", training=train_state())
    assert sent == []
    session.change("model", trainable_count=7)
    assert [name for name, _ in sent] == ["HTML"]


def test_rows_that_stay_keep_their_widgets(panel: AdaptersPanel, session: Any) -> None:
    before = button(panel, "orders")
    session.change("model", adapters=(*session.models["model"].adapters, adapter("new")))
    assert button(panel, "orders") is before
    assert "new" in labels(panel)


def test_older_states_are_not_drawn(panel: AdaptersPanel, session: Any) -> None:
    old = session.state
    session.use("sql", model="model")
    panel._published(old)
    assert marked(panel) == ["sql"]


def test_a_model_without_adapters_and_one_that_is_gone(panel: AdaptersPanel, session: Any) -> None:
    session.change("model", adapters=(), active=())
    assert "No adapters yet" in text(panel)
    assert labels(panel) == []
    del session.models["model"]
    session.publish()
    assert "There is no model" in text(panel)
    session.models["model"] = model()
    session.publish()
    assert marked(panel) == ["orders"]


def test_handlers_may_run_in_other_threads(panel: AdaptersPanel, session: Any) -> None:
    def click() -> None:
        for name in ("sql", "pirate", "base"):
            button(panel, name).click()

    threads = [threading.Thread(target=click) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(session.commands) == 12
    session.use("sql", model="model")
    assert marked(panel) == ["sql"]


def test_without_widgets_it_is_html_or_text(session: Any) -> None:
    assert set(AdaptersPanel(session, "model", ui="html")._repr_mimebundle_()) == {"text/plain", "text/html"}
    assert set(AdaptersPanel(session, "model", ui="text")._repr_mimebundle_()) == {"text/plain"}
    assert set(AdaptersPanel(session, "model")._repr_mimebundle_()) == {"text/plain"}  # no kernel
    assert repr(AdaptersPanel(session)).startswith("model (LlamaForCausalLM): orders* [LoRA]")
    assert session.subscriber_count == 0


def test_one_panel_a_model(session: Any) -> None:
    first = AdaptersPanel(session, "model", ui="widgets")
    root = first.widget
    second = AdaptersPanel(session, "model", ui="widgets")
    assert root.comm is not None
    assert second.widget is not root
    assert [part.value for part in root.children if panel_module.MOVED in part.value]
    second.close()
    assert root.comm is not None
    panel_module.close_panels()
    assert root.comm is None


def test_only_the_last_moved_panels_leave_a_line(session: Any) -> None:
    roots = [AdaptersPanel(session, "model", ui="widgets").widget for _ in range(panel_module._LINES + 3)]
    assert [root.comm is None for root in roots] == [True] * 2 + [False] * (panel_module._LINES + 1)
    panel_module.close_panels()


def test_panels_of_two_models_live_side_by_side() -> None:
    session: Any = FakeSession(model("a"), model("b"))
    panels = [AdaptersPanel(session, name, ui="widgets") for name in ("a", "b")]
    roots = [panel.widget for panel in panels]
    assert all(root.comm is not None for root in roots)
    button(panels[1], "sql").click()
    assert marked(panels[0]) == ["orders"]
    assert marked(panels[1]) == ["sql"]
    for panel in panels:
        panel.close()


def test_closing_frees_everything(session: Any) -> None:
    before = len(live_widgets())
    panel = AdaptersPanel(session, "model", ui="widgets")
    button(panel, "Save").click()
    button(panel, "Delete", 1).click()
    assert len(live_widgets()) > before
    panel.close()
    panel.close()
    assert len(live_widgets()) == before
    assert session.subscriber_count == 0
    assert ("adapters", (id(session), "model")) not in panel_module._open
    measured(panel)
    gone = weakref.ref(panel)
    del panel
    gc.collect()
    assert gone() is None


def test_a_panel_that_was_only_made_costs_nothing(session: Any) -> None:
    before = len(live_widgets())
    panel = AdaptersPanel(session, "model", ui="widgets")
    assert len(live_widgets()) == before
    assert session.subscriber_count == 0
    panel.close()


def test_all_that_is_shown_can_be_closed_at_once(session: Any, outputs: list[Output]) -> None:
    before = len(live_widgets())
    panel = AdaptersPanel(session, "model", ui="widgets")
    assert panel.widget is not None
    run: Any = FakeRun(session)
    show_run(run, session, "model", ui="widgets")
    assert len(live_widgets()) > before
    close_all()
    assert len(live_widgets()) == before
    assert session.subscriber_count == 0
    assert outputs[1].last["text/html"] == ""
