"""The compare and the blend panel: answers come while they come, the session decides, nothing is left behind."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import ipywidgets
import pytest

from nbpeft.errors import AdapterError, BusyError
from nbpeft.widgets import AdaptersPanel, BlendPanel, ComparePanel, close_all, panel
from nbpeft.widgets.blend_panel import DEBOUNCE
from nbpeft.widgets.lifetime import close_tree
from tests.waiting import PATIENCE, wait_until
from tests.widgets.answering import ANSWERS, BLENDED, PROMPT, TOKENIZER, AnsweringSession
from tests.widgets.support import button, labels, live_widgets, parts, text

pytestmark = pytest.mark.usefixtures("no_widget_stays")


@pytest.fixture
def session() -> AnsweringSession:
    return AnsweringSession()


@pytest.fixture
def compare(session: Any) -> Iterator[ComparePanel]:
    made = ComparePanel(session, "model", ui="widgets", tokenizer=TOKENIZER, prompt=PROMPT)
    assert made.widget is not None
    yield made
    made.close()
    assert made.wait(PATIENCE)


@pytest.fixture
def blend(session: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlendPanel]:
    monkeypatch.setattr("nbpeft.widgets.blend_panel.DEBOUNCE", 0.05)
    made = BlendPanel(session, "model", ui="widgets", prompt=PROMPT)
    assert made.widget is not None
    yield made
    made.close()
    assert made.wait(PATIENCE)


def dropdown(shown: Any, value: Any) -> Any:
    (found,) = [part for part in parts(shown, ipywidgets.Dropdown) if part.value == value]
    return found


def prompt_form(shown: Any) -> Any:
    (found,) = [part for part in parts(shown, ipywidgets.Dropdown) if "apply" in str(part.options)]
    return found


def slider(shown: Any, place: int) -> Any:
    return parts(shown, ipywidgets.FloatSlider)[place]


def press(shown: Any, label: str) -> None:
    button(shown, label).click()
    assert shown.wait(PATIENCE)


def begun(session: AnsweringSession) -> None:
    """Waits until the worker answers."""
    wait_until(lambda: session.threads)


# Compare


def test_the_base_and_all_adapters_answer(compare: ComparePanel, session: AnsweringSession) -> None:
    press(compare, "Send")
    assert session.commands == [("compare", PROMPT, ("orders", "pirate", "sql"), True)]
    shown = text(compare)
    assert "chairs for her ship!" in shown and "differs" in shown
    assert "answered in" in shown
    assert compare.result is not None and list(compare.result.answers) == ["base", "orders", "pirate", "sql"]
    assert "Stop" not in labels(compare)


def test_the_prompt_can_be_sent_without_the_chat_template(compare: ComparePanel, session: AnsweringSession) -> None:
    press(compare, "Send")
    prompt_form(compare).value = "do not apply"
    press(compare, "Send")
    prompt_form(compare).value = "apply"
    press(compare, "Send")
    assert session.chats == [None, False, True]


def test_the_form_of_the_prompt_is_answered_anew(blend: BlendPanel, session: AnsweringSession) -> None:
    press(blend, "Answer")
    prompt_form(blend).value = "do not apply"
    assert blend.wait(PATIENCE)
    assert session.chats == [None, False]
    assert session.commands[-1][3] is True, "the base model answers anew, too"


@pytest.mark.parametrize("kind", [ComparePanel, BlendPanel])
def test_a_panel_may_begin_with_the_plain_prompt(session: Any, kind: type[Any]) -> None:
    made = kind(session, "model", ui="widgets", chat=False)
    assert prompt_form(made).value == "do not apply"
    made.close()


def test_columns_can_be_left_out(compare: ComparePanel, session: AnsweringSession) -> None:
    button(compare, "sql").click()
    button(compare, "base").click()
    session.publish()
    marked = [part.description for part in parts(compare, ipywidgets.Button) if "nbpeft-on" in part._dom_classes]
    assert marked == ["orders", "pirate"]
    press(compare, "Send")
    assert session.commands == [("compare", PROMPT, ("orders", "pirate"), False)]
    button(compare, "sql").click()
    press(compare, "Send")
    assert session.commands[-1] == ("compare", PROMPT, ("orders", "pirate", "sql"), False)


def test_answers_come_from_a_thread_and_can_be_stopped(compare: ComparePanel, session: AnsweringSession) -> None:
    session.go.clear()
    button(compare, "Send").click()
    assert "Stop" in labels(compare) and "Send" not in labels(compare)
    assert "answering …" in text(compare)
    begun(session)
    button(compare, "Stop").click()
    session.go.set()
    assert compare.wait(PATIENCE)
    assert session.threads == ["nbpeft-answers"]
    assert compare.result is not None and compare.result.status == "stopped"
    assert "stopped" in text(compare)
    assert "Send" in labels(compare)


def test_an_answer_that_has_not_begun_can_be_stopped(blend: BlendPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbpeft.widgets.blend_panel.DEBOUNCE", 30.0)
    slider(blend, 1).value = 0.5
    assert "answering …" in text(blend)
    press(blend, "Stop")
    assert "Answer" in labels(blend) and "answering" not in text(blend)


def test_words_are_marked_against_the_chosen_column(compare: ComparePanel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ANSWERS, "pirate", BLENDED)
    press(compare, "Send")
    against = dropdown(compare, "base")
    assert (against.value, list(against.options)) == ("base", ["base", "orders", "pirate", "sql"])
    assert "background:rgba(114" not in text(compare)
    against.value = "orders"
    assert 'border-radius:2px">&quot;12, arr&quot;</span>' in text(compare)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AdapterError("a tokenizer is <needed>"), "a tokenizer is &lt;needed&gt;"),
        (RuntimeError("no room"), "RuntimeError: no room"),
        (BusyError("busy: training"), "busy: training"),
    ],
)
def test_errors_are_shown_in_the_panel(
    compare: ComparePanel, session: AnsweringSession, error: Exception, words: str
) -> None:
    session.error = error
    press(compare, "Send")
    assert words in text(compare)
    assert "Send" in labels(compare)
    session.error = None
    press(compare, "Send")
    assert words not in text(compare)


def test_no_prompt_is_said_and_asks_nothing(compare: ComparePanel, session: AnsweringSession) -> None:
    parts(compare, ipywidgets.Textarea)[0].value = "  "
    press(compare, "Send")
    assert "Write a prompt first." in text(compare)
    assert session.commands == []


def test_new_adapters_become_columns(compare: ComparePanel, session: AnsweringSession) -> None:
    session.combine({"orders": 1}, name="new", type="exact", seed=0, model="model")
    assert "new" in labels(compare)
    session.delete("pirate", model="model")
    assert "pirate" not in labels(compare)


def test_a_model_that_is_gone_is_said(compare: ComparePanel, session: AnsweringSession) -> None:
    session.models.clear()
    session.publish()
    assert "There is no model &#x27;model&#x27; any more" in text(compare)
    press(compare, "Send")
    assert session.commands == []


# Blend


def test_sliders_begin_with_what_acts(blend: BlendPanel) -> None:
    assert [part.value for part in parts(blend, ipywidgets.FloatSlider)] == [1.0, 0.0, 0.0]


def test_the_exact_sum_follows_the_sliders_without_a_new_adapter(
    blend: BlendPanel, session: AnsweringSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbpeft.widgets.blend_panel.DEBOUNCE", 1000.0)
    for value in (0.2, 0.3):
        slider(blend, 1).value = value
    monkeypatch.setattr("nbpeft.widgets.blend_panel.DEBOUNCE", 0.0)
    slider(blend, 1).value = 0.4
    assert blend.wait(PATIENCE)
    assert session.commands == [("compare", PROMPT, (), True, {"orders": 1.0, "pirate": 0.4})]
    slider(blend, 0).value = 0.6
    assert blend.wait(PATIENCE)
    assert session.commands[1:] == [("compare", PROMPT, (), False, {"orders": 0.6, "pirate": 0.4})]
    assert blend.result is not None
    assert list(blend.result.answers) == ["base", "orders + pirate (0.6 / 0.4)"]
    assert "I am happy to help you" in text(blend)
    parts(blend, ipywidgets.Textarea)[0].value = "Another"
    press(blend, "Answer")
    assert session.commands[-1] == ("compare", "Another", (), True, {"orders": 0.6, "pirate": 0.4})


def test_a_move_stops_the_answer_that_runs(blend: BlendPanel, session: AnsweringSession) -> None:
    session.go.clear()
    button(blend, "Answer").click()
    begun(session)
    slider(blend, 1).value = 0.5
    session.go.set()
    assert blend.wait(PATIENCE)
    assert len(session.commands) == 2
    assert blend.result is not None and blend.result.status == "finished"
    assert blend.result.columns[-1].title == "orders + pirate (1 / 0.5)"


def test_ties_waits_for_the_button(blend: BlendPanel, session: AnsweringSession) -> None:
    kind = dropdown(blend, "exact")
    kind.value = "ties"
    slider(blend, 1).value = 0.5
    assert blend.wait(PATIENCE)
    assert session.commands == []
    assert "only the exact sum follows the sliders" in text(blend)
    press(blend, "Answer")
    assert session.commands == [("try", PROMPT, {"orders": 1.0, "pirate": 0.5}, "ties", 0.5, True)]


def test_a_blend_is_saved_as_an_adapter(blend: BlendPanel, session: AnsweringSession) -> None:
    slider(blend, 1).value = 0.5
    assert blend.wait(PATIENCE)
    name, rank = parts(blend, ipywidgets.Text)
    name.value, rank.value = " both ", "8"
    button(blend, "Save as adapter").click()
    assert session.commands[-1] == ("combine", {"orders": 1.0, "pirate": 0.5}, "both", "exact", {"r": 8})
    assert "made &#x27;both&#x27;" in text(blend)
    assert [part.value for part in parts(blend, ipywidgets.FloatSlider)] == [1.0, 0.5, 0.0, 0.0]
    button(blend, "Save as adapter").click()
    assert "has an adapter &#x27;both&#x27; already" in text(blend)
    parts(blend, ipywidgets.Dropdown)[0].value = "dare_ties"
    parts(blend, ipywidgets.BoundedFloatText)[0].value = 0.3
    name.value = "d"
    button(blend, "Save as adapter").click()
    assert session.commands[-1][1:] == ({"orders": 1.0, "pirate": 0.5}, "d", "dare_ties", {"density": 0.3})


@pytest.mark.parametrize(
    ("name", "rank", "words"), [("", "", "a name"), ("x", "many", "whole number"), ("x", "0", "rank")]
)
def test_what_cannot_be_saved_is_said(
    blend: BlendPanel, session: AnsweringSession, name: str, rank: str, words: str
) -> None:
    fields = parts(blend, ipywidgets.Text)
    fields[0].value, fields[1].value = name, rank
    button(blend, "Save as adapter").click()
    assert words in text(blend)
    assert session.commands == []


def test_all_at_zero_asks_nothing(blend: BlendPanel, session: AnsweringSession) -> None:
    slider(blend, 0).value = 0
    press(blend, "Answer")
    button(blend, "Save as adapter").click()
    assert "Every slider is at 0" in text(blend)
    assert session.commands == []


def test_the_wait_is_long_enough_for_a_hand() -> None:
    assert 0.2 <= DEBOUNCE <= 1


# Showing, closing


@pytest.mark.parametrize("kind", [ComparePanel, BlendPanel])
def test_the_bundle_is_a_snapshot_and_a_line(session: Any, kind: type[Any]) -> None:
    made = kind(session, "model", ui="widgets", prompt=PROMPT)
    bundle = made._repr_mimebundle_()
    assert "Run the cell again for buttons." in bundle["text/plain"] and "\n" not in bundle["text/plain"]
    assert "orders" in bundle["text/html"]
    press(made, "Send" if kind is ComparePanel else "Answer")
    assert "chairs" in made._repr_mimebundle_()["text/html"]
    made.close()
    assert "chairs" in made._repr_mimebundle_()["text/html"]
    assert set(kind(session, "model", ui="text")._repr_mimebundle_()) == {"text/plain"}
    assert set(kind(session, "model", ui="html")._repr_mimebundle_()) == {"text/plain", "text/html"}


@pytest.mark.parametrize("kind", [ComparePanel, BlendPanel])
def test_a_new_panel_closes_the_one_before(session: Any, kind: type[Any]) -> None:
    first, second = kind(session, "model", ui="widgets"), kind(session, "model", ui="widgets")
    assert first.widget is not None and second.widget is not None
    assert first.closed and not second.closed
    close_all()
    assert second.closed and not panel._open
    assert session.subscriber_count == 0


@pytest.mark.parametrize("kind", [ComparePanel, BlendPanel])
def test_a_closed_panel_is_free(session: Any, kind: type[Any]) -> None:
    made = kind(session, "model", ui="widgets", prompt=PROMPT)
    session.go.clear()
    button(made, "Send" if kind is ComparePanel else "Answer").click()
    made.close()
    made.close()
    session.go.set()
    assert made.wait(PATIENCE)
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


def test_the_adapters_panel_opens_them_below(session: Any) -> None:
    shown = AdaptersPanel(session, "model", ui="widgets", tokenizer=TOKENIZER)
    before = len(parts(shown, ipywidgets.Widget))
    count = len(live_widgets())
    button(shown, "Compare answers").click()
    assert len(parts(shown, ipywidgets.Textarea)) == 2 and "Send" in labels(shown)
    parts(shown, ipywidgets.Textarea)[0].value = PROMPT
    button(shown, "Blend adapters").click()
    assert "Answer" in labels(shown) and "Send" not in labels(shown)
    assert parts(shown, ipywidgets.Textarea)[0].value == PROMPT
    elsewhere = BlendPanel(session, "model", ui="widgets")
    assert elsewhere.widget is not None
    button(shown, "Blend adapters").click()
    assert elsewhere.closed and "Answer" in labels(shown)
    close_tree(panel._left.pop())  # the line that the one elsewhere left
    button(shown, "Blend adapters").click()
    assert len(parts(shown, ipywidgets.Widget)) == before
    assert len(live_widgets()) == count
    button(shown, "Compare answers").click()
    shown.close()
    assert not panel._open


# Settings and conversations


def number(shown: Any, label: str) -> Any:
    """The field with a label."""
    return next(widget for widget in parts(shown, ipywidgets.Widget) if getattr(widget, "description", "") == label)


def test_the_settings_reach_the_session(compare: ComparePanel, session: AnsweringSession) -> None:
    press(compare, "Send")
    assert session.sampling == {}, "greedy"
    number(compare, "temperature").value = 0.7
    number(compare, "top-p").value = 0.9
    press(compare, "Send")
    assert session.sampling == {"temperature": 0.7, "top_p": 0.9, "seed": None}
    number(compare, "seed").value = "12"
    press(compare, "Send")
    assert session.sampling["seed"] == 12
    asked = len(session.commands)
    number(compare, "seed").value = "lucky"
    press(compare, "Send")
    assert "seed must be a whole number" in text(compare) and len(session.commands) == asked


@pytest.mark.parametrize("conversing", [True, False])
def test_send_goes_on_with_the_conversation_in_every_column(conversing: bool) -> None:
    session: Any = AnsweringSession(conversing=conversing)
    compare = ComparePanel(session, "model", ui="widgets", tokenizer=TOKENIZER, prompt=PROMPT, temperature=0.5, seed=3)
    box = parts(compare, ipywidgets.Textarea)[0]
    press(compare, "Send")
    assert session.sampling == {"temperature": 0.5, "top_p": 1.0, "seed": 3}
    first = compare.result
    assert first is not None and box.value == ("" if conversing else PROMPT)
    assert compare.prompt == PROMPT, "another panel begins with it"
    assert ("New conversation" in labels(compare)) is conversing
    box.value = "And the sofas?"
    press(compare, "Send")
    second = compare.result
    assert second is not None and second.prompts == ("And the sofas?",)
    assert [len(column.turns) for column in second.columns] == [conversing] * 4
    assert (PROMPT in text(compare)) is conversing
    if conversing:
        button(compare, "New conversation").click()
        assert compare.result is None and "sofas" not in text(compare)
        press(compare, "Send")
        assert "Write a prompt first." in text(compare)
        box.value = "Anew"
        press(compare, "Send")
        assert compare.result is not None and not any(column.turns for column in compare.result.columns)
    compare.close()


def test_without_the_chat_template_it_begins_anew(session: Any) -> None:
    session = AnsweringSession(conversing=True)
    compare = ComparePanel(session, "model", ui="widgets", tokenizer=TOKENIZER, prompt=PROMPT)
    press(compare, "Send")
    prompt_form(compare).value = "do not apply"
    parts(compare, ipywidgets.Textarea)[0].value = "Again"
    press(compare, "Send")
    assert compare.result is not None and not any(column.turns for column in compare.result.columns)
    compare.close()


# The system prompt


def trained_with(session: AnsweringSession, **systems: str | None) -> None:
    adapters = session.models["model"].adapters
    changed = tuple(dataclasses.replace(item, system=systems.get(item.name)) for item in adapters)
    session.change("model", adapters=changed)


@pytest.mark.parametrize("panel_class", [ComparePanel, BlendPanel])
def test_the_system_prompt_is_that_of_the_training_until_it_is_edited(
    session: Any, panel_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbpeft.widgets.blend_panel.DEBOUNCE", 0.05)
    trained_with(session, orders="Be brief")
    shown = panel_class(session, "model", ui="widgets", tokenizer=TOKENIZER, prompt=PROMPT)
    field, send = number(shown, "system prompt"), "Send" if panel_class is ComparePanel else "Answer"
    assert (field.value, field.placeholder) == ("Be brief", "none")
    press(shown, send)
    trained_with(session, orders="Be long")
    assert field.value == "Be long"
    trained_with(session, orders="Be long", pirate="Ahoy")
    assert (field.value, field.placeholder) == ("", "of each adapter's training rows")
    press(shown, send)
    field.value = " Sing "
    assert shown.wait(PATIENCE)
    press(shown, send)
    trained_with(session, orders="Be brief")
    assert field.value == " Sing "
    field.value = ""
    assert shown.wait(PATIENCE)
    press(shown, send)
    assert list(dict.fromkeys(session.systems)) == [None, "Sing", ""]
    shown.close()
    assert shown.wait(PATIENCE)


def test_a_panel_begins_with_a_given_system_prompt(session: Any) -> None:
    trained_with(session, orders="Be brief")
    for given in ("Sing", ""):
        shown = ComparePanel(session, "model", ui="widgets", tokenizer=TOKENIZER, prompt=PROMPT, system=given)
        press(shown, "Send")
        assert session.systems[-1] == given
        shown.close()
