"""The live view of a run: few updates, the last one always, and buttons that vanish."""

from __future__ import annotations

import dataclasses
import gc
import io
import re
import threading
import time
from typing import Any

import pytest

from nbpeft.display import charts
from nbpeft.display.html import to_html
from nbpeft.display.training import status_message, training_card, training_text
from nbpeft.state import MemberState
from nbpeft.widgets import environment, run_buttons, run_outputs, show_run, training_panel
from nbpeft.widgets.environment import WIDGET_VIEW
from nbpeft.widgets.lifetime import close_tree
from nbpeft.widgets.training_panel import RunView
from tests.waiting import PATIENCE, wait_until
from tests.widgets.fakes import FakeRun, FakeSession, adapter, model, simulate, train_state
from tests.widgets.support import Output, live_widgets

pytestmark = pytest.mark.usefixtures("no_widget_stays")


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


class Clock:
    """The time as panels see it; only the test moves it.

    Attributes:
        now: seconds.
        drawing: what an update of the panel takes.
    """

    def __init__(self) -> None:
        self.now, self.drawing = 100.0, 0.0
        self._counted = 0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, form: str) -> str:
        return "2026-11-28 21:52"

    def perf_counter(self) -> float:
        """Called before and after each update."""
        self._counted += 1
        return self.drawing * self._counted


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still; no thread looks at it."""
    made = Clock()
    monkeypatch.setattr(training_panel, "time", made)
    monkeypatch.setattr(run_outputs, "time", made)
    monkeypatch.setattr(RunView, "_tick", lambda self: None)
    return made


def fake_run(session: Any) -> Any:
    """A run that the type checker takes for a real one."""
    return FakeRun(session)


def shown(session: Any, ui: Any = "html") -> None:
    session.started.append(lambda run, name: show_run(run, session, name, ui=ui))


def test_a_run_is_one_output_that_ends_with_an_image(session: Any, outputs: list[Output]) -> None:
    shown(session)
    simulate(session, steps=5, seconds=0)
    (output,) = outputs
    assert "<svg" in output.bundles[0]["text/html"]
    assert "<img" in output.last["text/html"]
    assert "5 / 5" in output.last["text/html"]
    assert output.last["text/plain"].startswith("training orders finished: step 5/5")
    assert training_panel._live == {}


def test_updates_are_few(session: Any, outputs: list[Output], clock: Clock) -> None:
    view = RunView(fake_run(session), session, "model", ui="html")
    view.start()
    for step in range(1, 101):
        clock.now += 0.01
        view.draw(train_state(step, 200))
    assert 6 <= len(outputs[0].bundles) <= 8
    view.close()


def test_a_change_of_status_is_drawn_at_once(session: Any, outputs: list[Output], clock: Clock) -> None:
    view = RunView(fake_run(session), session, "model", ui="html")
    view.start()
    for status in ("pausing", "paused", "stopping"):
        view.draw(train_state(1, status=status))
        assert f"({status_message(train_state(1, status=status))})</span>" in outputs[0].last["text/html"]
    view.close()


def test_equal_states_are_drawn_once(session: Any, outputs: list[Output], clock: Clock) -> None:
    view = RunView(fake_run(session), session, "model", ui="html")
    view.start()
    session.publish()
    session.publish()
    assert len(outputs[0].bundles) == 1
    view.close()


def card_of(output: Output) -> str:
    """The card in the widgets of an output."""
    root = live_widgets()[output.bundles[0][WIDGET_VIEW]["model_id"]]
    return str(root.children[1].value)


def test_the_buttons_vanish_with_the_run(session: Any, outputs: list[Output]) -> None:
    shown(session, "widgets")
    simulate(session, steps=3, seconds=0)
    card, widgets = outputs
    assert WIDGET_VIEW in widgets.bundles[0]
    assert widgets.last == {"text/html": "", "text/plain": ""}, "an open page has the card that is saved"
    assert WIDGET_VIEW not in str(card.bundles)
    root = live_widgets()[widgets.bundles[0][WIDGET_VIEW]["model_id"]]
    assert root.children[2].layout.display == "none"


class TestAPageThatIsOpenedAgain:
    """The page gets the widgets from the kernel, as they are now, and the rest from its file."""

    def test_shows_the_run_as_it_is_now(self, session: Any, outputs: list[Output], clock: Clock) -> None:
        view = RunView(fake_run(session), session, "model", ui="widgets")
        view.start()
        for step in (23, 24, 25):
            view.draw(train_state(step, 120), at_once=True)
        assert "25 / 120" in card_of(outputs[1]) and ">running</span>" in card_of(outputs[1])
        assert "step 23 of 120" in outputs[0].last["text/html"], "the card that is saved is updated less often"
        view.close()

    def test_hides_the_card_of_its_file(self, session: Any, outputs: list[Output]) -> None:
        view = RunView(fake_run(session), session, "model", ui="widgets")
        view.start()
        root = live_widgets()[outputs[1].bundles[0][WIDGET_VIEW]["model_id"]]
        name = next(name for name in root._dom_classes if name.endswith("-view")).removesuffix("-view")
        assert f'class="nbpeft-state {name}"' in outputs[0].last["text/html"]
        assert f":root:has(.{name}-view:not(.jupyter-widgets-disconnected)) .{name}," in root.children[0].value
        view.close()

    def test_shows_the_end_if_the_run_has_ended(self, session: Any, outputs: list[Output]) -> None:
        shown(session, "widgets")
        simulate(session, steps=3, seconds=0)
        assert ">finished</span>" in card_of(outputs[1]) and "3 / 3" in card_of(outputs[1])

    def test_only_the_last_ends_are_kept(self, session: Any, outputs: list[Output]) -> None:
        shown(session, "widgets")
        for _ in range(training_panel._MOST_ENDED + 2):
            simulate(session, steps=1, seconds=0)
        assert len(training_panel._ended) == training_panel._MOST_ENDED
        training_panel.close_views()
        assert not training_panel._ended


class TestASavedCard:
    """What a notebook shows that was saved while the run went on, and is opened without its kernel."""

    @pytest.mark.parametrize(
        ("status", "more"), [("running", ""), ("paused", " (paused)"), ("stopping", " (stopping after this step)")]
    )
    @pytest.mark.parametrize("ui", ["html", "widgets"])
    def test_says_when_it_was_seen_last(
        self, session: Any, outputs: list[Output], clock: Clock, ui: Any, status: Any, more: str
    ) -> None:
        view = RunView(fake_run(session), session, "model", ui=ui)
        view.start()
        view.draw(train_state(23, 120, status=status), at_once=True)
        view.close()
        html, text = outputs[0].last["text/html"], outputs[0].last["text/plain"]
        assert f">last seen 2026-11-28 21:52, step 23 of 120{more}</span>" in html
        assert "running" not in html + text

    def test_of_a_run_that_has_ended_says_so(self, session: Any, outputs: list[Output]) -> None:
        shown(session, "widgets")
        simulate(session, steps=5, seconds=0)
        assert "last seen" not in outputs[0].last["text/html"] + outputs[0].last["text/plain"]
        assert ">finished</span>" in outputs[0].last["text/html"]


class TestAFinishedCard:
    @pytest.mark.parametrize("ui", ["html", "widgets"])
    def test_says_that_the_adapter_is_not_saved_until_it_is(self, session: Any, outputs: list[Output], ui: Any) -> None:
        session.change("model", adapters=(adapter("orders", active=True, unsaved=True),))
        shown(session, ui)
        simulate(session, steps=3, seconds=0)
        cards = [lambda: outputs[0].last["text/html"]] + [lambda: card_of(outputs[1])] * (ui == "widgets")
        for card in cards:
            assert "not saved" in card() and "%lora save adapters/orders --adapter orders" in card()
        session.change("model", adapters=(adapter("orders", active=True),))
        wait_until(lambda: all("not saved" not in card() and "✓ saved" in card() for card in cards))
        session.delete("orders", model="model")
        gone = "orders is not on the model model."
        wait_until(lambda: all("saved" not in card() and gone in card() for card in cards))

    def test_is_not_drawn_again_for_other_changes(self, session: Any, outputs: list[Output]) -> None:
        shown(session)
        simulate(session, steps=3, seconds=0)
        count = len(outputs[0].bundles)
        session.use("sql", model="model")
        assert len(outputs[0].bundles) == count


@pytest.mark.parametrize("ui", ["html", "widgets"])
def test_the_same_run_in_another_cell_leaves_its_last_state_and_a_line(
    session: Any, outputs: list[Output], ui: Any
) -> None:
    run = fake_run(session)
    show_run(run, session, "model", ui=ui)
    second = show_run(run, session, "model", ui=ui)
    assert training_panel.MOVED in outputs[0].last["text/html"]
    assert WIDGET_VIEW not in outputs[1].last
    assert training_panel._live[id(session), "model"] is second
    second.close()


def run_in_thread(session: Any, steps: int) -> tuple[FakeRun, threading.Thread]:
    run = FakeRun(session, steps)

    def loop() -> None:
        with run:
            while not run.step() and run.state.step < steps:
                time.sleep(0.005)

    thread = threading.Thread(target=loop)
    thread.start()
    return run, thread


def ticking() -> bool:
    """Whether a thread still moves the clock of a view."""
    return any(thread.name == "nbpeft-run-view" for thread in threading.enumerate())


def seen(buttons: Any) -> list[str]:
    return [button.description for button in buttons.box.children[0].children if button.layout.display != "none"]


def test_the_buttons_pause_resume_and_stop(session: Any, outputs: list[Output]) -> None:
    shown(session, "widgets")
    run, thread = run_in_thread(session, 10_000)
    wait_until(lambda: training_panel._live and next(iter(training_panel._live.values()))._buttons)
    buttons = next(iter(training_panel._live.values()))._buttons
    assert buttons is not None
    assert seen(buttons) == ["Pause", "Stop", "Save now"]
    buttons.pause.click()
    wait_until(lambda: seen(buttons) == ["Resume", "Stop", "Save now"])
    assert run.state.status == "paused"
    wait_until(lambda: ">paused</span>" in card_of(outputs[1]))
    before = run.state.step
    buttons.resume.click()
    wait_until(lambda: run.state.step > before)
    wait_until(lambda: seen(buttons) == ["Pause", "Stop", "Save now"])
    buttons.stop.click()
    thread.join(PATIENCE)
    assert "stopped: step" in training_text(run.state)
    assert run.control.deliver_clicks is None


@pytest.mark.parametrize("delivered", ["by the widget", "while the cell runs"])
def test_a_second_click_on_pause_pauses_too(
    session: Any, outputs: list[Output], monkeypatch: pytest.MonkeyPatch, delivered: str
) -> None:
    listeners: dict[str, Any] = {}

    class Delivery:
        def poll(self) -> None: ...

        def close(self) -> None: ...

    def deliver(found: dict[str, Any]) -> Delivery | None:
        listeners.update(found)
        return Delivery() if delivered == "while the cell runs" else None

    monkeypatch.setattr(run_buttons, "deliver_clicks", deliver)
    control = FakeRun(session).control
    buttons = run_buttons.RunButtons(control)

    def click(button: Any) -> None:
        if delivered == "while the cell runs":
            listeners[button.comm.comm_id]()
        else:
            button.click()

    click(buttons.pause)
    click(buttons.pause)  # before the step has ended and the button has changed
    assert control.paused
    buttons.sync()
    click(buttons.pause)  # sent before the page showed Resume
    assert control.paused
    click(buttons.resume)
    click(buttons.resume)
    assert not control.paused
    if delivered == "while the cell runs":
        for button in (*[buttons.pause] * 3, *[buttons.resume] * 2):
            button.click()  # the kernel's own delivery, when the cell is done
        assert not control.paused
    close_tree(buttons.box)


def test_each_adapter_of_a_sweep_has_a_stop_and_a_clone_new_ones_too(session: Any, monkeypatch: Any) -> None:
    listeners: dict[str, Any] = {}

    class Delivery:
        needs_peeking = False

        def add(self, found: dict[str, Any]) -> None:
            listeners.update(found)

        def close(self) -> None: ...

    def deliver(found: dict[str, Any]) -> Delivery:
        listeners.update(found)
        return Delivery()

    monkeypatch.setattr(run_buttons, "deliver_clicks", deliver)
    control = FakeRun(session).control
    buttons = run_buttons.RunButtons(control, sweep_of("a", "b"))
    listeners[buttons.clones["a"].comm.comm_id]()
    assert control.members_to_clone == {"a"}
    buttons.sync(sweep_of("a", "b"))
    assert buttons.clones["a"].disabled and not buttons.clones["b"].disabled
    (request,) = control.take_clones()
    assert (request.source, request.name, request.rate_factor) == ("a", None, 0.5)
    buttons.sync(sweep_of("b", "a", "a-lr5e-5"))
    assert not buttons.clones["a"].disabled and buttons.members.keys() == {"a", "b", "a-lr5e-5"}
    rows = buttons.table.children[1:]
    assert [re.search(r"([\w-]+)</(?:b|span|div)>", row.children[0].value)[1] for row in rows] == ["b", "a", "a-lr5e-5"]
    assert [button.description for button in rows[-1].children[1:]] == ["Stop", "Clone"]
    assert rows[-1].children[1].tooltip.startswith("Stop training a-lr5e-5") and buttons.table.layout.display is None
    listeners[buttons.members["a-lr5e-5"].comm.comm_id]()
    assert control.members_to_stop == {"a-lr5e-5"}
    buttons.sync()
    assert buttons.members["a-lr5e-5"].disabled and buttons.clones["a-lr5e-5"].disabled
    buttons.close()
    for button in (buttons.clones["a"], buttons.members["a-lr5e-5"]):
        button.click()  # the kernel's own delivery, when the cell is done
    assert not control.members_to_clone
    close_tree(buttons.box)


def sweep_of(*names: str) -> Any:
    """A state of a sweep, the best adapter first."""
    members = tuple(
        MemberState(name, "training", 3, {"learning_rate": "1e-4"}, smoothed_loss=1.0 + place)
        for place, name in enumerate(names)
    )
    return dataclasses.replace(train_state(3), members=members)


def test_a_live_card_leaves_the_adapters_of_a_sweep_to_the_rows_with_buttons() -> None:
    state = sweep_of("codes-lr1e-4", "codes-lr1e-3")
    live, saved = (to_html(training_card(state, members=members)) for members in (False, True))
    assert "gradient norm" not in live and "gradient norm" in saved
    assert "loss of the best" in live and "codes-lr1e-4" in live and "mean loss" not in saved


class SlowStep:
    """A run inside a step that lasts until it is released."""

    def __init__(self, session: Any) -> None:
        self.session, self.release = session, threading.Event()
        self.run = FakeRun(session, 100)
        self.thread = threading.Thread(target=self._loop)

    def _loop(self) -> None:
        with self.run:
            self.run.step()
            while not self.release.wait(0.01):
                pass
            self.run.step()

    def __enter__(self) -> Any:
        self.thread.start()
        wait_until(lambda: self.run.state.step == 1 and next(iter(training_panel._live.values()))._buttons)
        return next(iter(training_panel._live.values()))._buttons

    def __exit__(self, *_: object) -> None:
        self.run.control.request_stop()
        self.release.set()
        self.thread.join(PATIENCE)


def test_a_click_shows_while_a_step_runs(session: Any, outputs: list[Output]) -> None:
    """The training thread is inside a step all the time."""
    shown(session, "widgets")
    step = SlowStep(session)
    with step as buttons:
        buttons.pause.click()
        wait_until(lambda: ">pausing after this step</span>" in card_of(outputs[1]))
        wait_until(lambda: seen(buttons) == ["Pausing…", "Stop", "Save now"] and buttons.pause.disabled)
        buttons.pause.click()  # again, impatiently
        assert step.run.control.paused
        buttons.save.click()
        wait_until(lambda: buttons.save.description == "Saving…")
        buttons.stop.click()
        wait_until(lambda: ">stopping after this step</span>" in card_of(outputs[1]))
        wait_until(lambda: seen(buttons)[1] == "Stopping…" and buttons.stop.disabled)
        assert step.run.state.step == 1
    assert ">stopped</span>" in outputs[0].last["text/html"]


def test_the_clock_moves_while_a_step_runs(
    session: Any, outputs: list[Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_panel, "_TICK", 0.02)
    drawn: list[Any] = []
    monkeypatch.setattr(run_outputs.WidgetOutput, "draw", lambda self, train: drawn.append(train))
    shown(session, "widgets")
    step = SlowStep(session)
    with step:
        count = len(drawn)
        wait_until(lambda: len(drawn) >= count + 3)
        assert drawn[-1].elapsed > drawn[count].elapsed
        assert step.run.state.step == 1
    wait_until(lambda: not ticking())


def test_a_run_that_nobody_ends_ticks_no_longer_than_its_cell(session: Any, outputs: list[Output]) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        shell.user_ns["begin"] = lambda: show_run(fake_run(session), session, "model", ui="html")
        shell.run_cell("view = begin();", store_history=False)
        wait_until(lambda: not ticking())
        shell.user_ns["view"].close()
    finally:
        InteractiveShell.clear_instance()


def test_a_click_shows_after_the_cell_of_a_training_in_the_background(session: Any, outputs: list[Output]) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell, run = InteractiveShell.instance(), fake_run(session)
    run.thread = 0  # that of the training
    try:
        shell.user_ns["begin"] = lambda: show_run(run, session, "model", ui="html")
        shell.run_cell("view = begin();", store_history=False)
        run.control.pause()
        wait_until(lambda: "(pausing after this step)</span>" in outputs[0].last["text/html"])
        shell.user_ns["view"].close()
        wait_until(lambda: not ticking())
    finally:
        InteractiveShell.clear_instance()


def test_what_changes_twice_in_a_cell_is_saved_as_it_is_at_its_end(
    session: Any, outputs: list[Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted and undone, for example; a program that executes notebooks sees nothing that is sent after the cell."""
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setattr(run_outputs, "_INTERVAL", 600.0)
    monkeypatch.setattr("nbpeft.widgets.panel_output._LONGEST", 600.0)
    unsaved = adapter("orders", active=True, unsaved=True)

    def delete_and_undo() -> None:
        session.change("model", adapters=())
        session.change("model", adapters=(unsaved,))

    shell = InteractiveShell.instance()
    try:
        session.change("model", adapters=(unsaved,))
        shown(session, "widgets")
        simulate(session, steps=3, seconds=0)
        shell.user_ns["delete_and_undo"] = delete_and_undo
        shell.run_cell("delete_and_undo()", store_history=False)
        assert "is not on the model" not in outputs[0].last["text/html"] and "not saved" in outputs[0].last["text/html"]
        training_panel.close_views()
    finally:
        InteractiveShell.clear_instance()


@pytest.mark.slow
def test_hundreds_of_runs_leave_nothing_behind(session: Any, outputs: list[Output]) -> None:
    """Neither objects, nor threads, nor functions that wait for the end of a cell."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.user_ns["train"] = lambda: simulate(session, steps=2, seconds=0)
    shown(session, "widgets")
    try:
        counts = []
        for runs in (100, 300):
            for _ in range(runs):
                shell.run_cell("done = train()", store_history=False)
                assert len(outputs) == 2
                outputs.clear()
            wait_until(lambda: not ticking())
            gc.collect()
            counts.append(len(gc.get_objects()))
            assert len(shell.events.callbacks["post_run_cell"]) <= 1
            assert len(shell.events.callbacks["post_execute"]) <= 1
        assert counts[1] - counts[0] < 300  # less than an object a run
    finally:
        InteractiveShell.clear_instance()


def test_drawing_that_is_slow_is_done_more_rarely(session: Any, outputs: list[Output], clock: Clock) -> None:
    """A hundredth of the time, whatever an update takes."""
    clock.drawing = 0.01
    view = RunView(fake_run(session), session, "model", ui="html")
    view.start()
    before = len(outputs[0].bundles)
    for step in range(1, 101):  # ten steps a second for ten seconds
        clock.now += 0.1
        view.draw(train_state(step, 200))
    assert len(outputs[0].bundles) - before == pytest.approx(10, abs=1)
    view.close()


def test_a_click_that_comes_again_after_the_run_does_nothing(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listeners: dict[str, Any] = {}

    class Delivery:
        def poll(self) -> None: ...

        def close(self) -> None: ...

    def deliver(found: dict[str, Any]) -> Delivery:
        listeners.update(found)
        return Delivery()

    monkeypatch.setattr(run_buttons, "deliver_clicks", deliver)
    run = FakeRun(session)
    buttons = run_buttons.RunButtons(run.control)
    listeners[buttons.stop.comm.comm_id]()
    assert run.control.stop_requested
    buttons.close()
    assert buttons.stop.comm is not None  # lives on, unseen, for the kernel's own delivery
    assert buttons.box.layout.display == "none"
    following = FakeRun(session)
    others = run_buttons.RunButtons(following.control)
    buttons.stop.click()
    assert not following.control.stop_requested
    for made in (buttons, others):
        made.close()
        close_tree(made.box)


def test_a_new_run_takes_the_place_of_one_that_never_ended(session: Any, outputs: list[Output]) -> None:
    first = show_run(fake_run(session), session, "model", ui="widgets")
    second = show_run(fake_run(session), session, "model", ui="widgets")
    assert outputs[1].last["text/html"] == ""
    assert first._output is None
    second.close()


def test_a_run_on_a_model_the_session_does_not_carry(outputs: list[Output]) -> None:
    session: Any = FakeSession(model("other"))
    shown(session)
    with FakeRun(session, 4, "model") as run:
        run.step()
        run._publish()
    assert "1 / 4" in outputs[0].last["text/html"]
    assert "finished" in outputs[0].last["text/html"]


def test_a_failed_run_keeps_its_picture(session: Any, outputs: list[Output]) -> None:
    shown(session)
    with pytest.raises(ZeroDivisionError), FakeRun(session, 4) as run:
        run.step()
        raise ZeroDivisionError("half")
    assert "failed" in outputs[0].last["text/html"]
    assert "half" in outputs[0].last["text/html"]


def test_without_ipywidgets_it_says_how_to_stop(
    session: Any, outputs: list[Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "has_ipywidgets", lambda: False)
    monkeypatch.setattr(environment, "running_kernel", lambda: object())
    shown(session, "auto")
    simulate(session, steps=2, seconds=0)
    (output,) = outputs
    assert "Interrupting the kernel" in output.bundles[0]["text/html"]
    assert "pip install ipywidgets" in output.bundles[0]["text/html"]
    assert "Interrupting" not in output.last["text/html"]


class Terminal(io.StringIO):
    """A stream that is a terminal, or not.

    Args:
        terminal: Whether it is one.
    """

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_in_a_terminal_it_is_a_line(session: Any, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = Terminal(terminal)
    monkeypatch.setattr("sys.stdout", stream)
    shown(session, "auto")
    simulate(session, steps=3, seconds=0)
    written = stream.getvalue()
    assert written.endswith("\n")
    assert "finished: step 3/3" in written
    assert written.count("\n") == (1 if terminal else 2)
    assert ("\r" in written) is terminal


def test_a_line_in_a_terminal_replaces_a_longer_one_and_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal(True)
    output = run_outputs.TextOutput(stream)
    output.draw(train_state(25, 40))
    output.draw(train_state(25, 40, eval_loss=None, tokens_per_second=None))
    first, second = stream.getvalue().split("\r")[1:]
    assert len(first) == len(second) < 60
    assert "…" in first


def test_the_last_state_is_sent_again_when_the_cell_is_done(session: Any, outputs: list[Output]) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        shown(session)
        simulate(session, steps=2, seconds=0)
        count = len(outputs[0].bundles)
        shell.run_cell("1;", store_history=False)
        assert len(outputs[0].bundles) == count + 1
        assert outputs[0].last["text/html"] == outputs[0].bundles[-2]["text/html"]
        shell.run_cell("1;", store_history=False)
        assert len(outputs[0].bundles) == count + 1
    finally:
        InteractiveShell.clear_instance()


def test_ended_states_are_those_of_the_state_module() -> None:
    from typing import get_args

    from nbpeft.state import TrainStatus

    assert set(charts.ENDED) < set(get_args(TrainStatus))
