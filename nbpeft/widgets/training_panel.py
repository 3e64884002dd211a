"""The live view of a training run.

    state   HTML pushed into one output, at most five times a second: it is saved with the notebook
    chart   SVG during the run, an image in the last state
    clicks  Pause, Stop and Save now in an output of their own, which is cleared when the run ends

States come from the training thread between steps. A step may take a minute: a separate thread updates the elapsed time
each second and responds to a click at once.

The state is HTML, not a widget: a widget would leave "Error displaying widget" when the notebook is opened again.
"""

from __future__ import annotations

import contextvars
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from nbpeft.display.html import to_html
from nbpeft.display.training import training_card, training_text
from nbpeft.state import ENDED, SessionState, TrainState
from nbpeft.widgets.environment import Ui, shown_as, widgets_hint
from nbpeft.widgets.panel_output import DEAD_WIDGETS
from nbpeft.widgets.run_buttons import RunButtons, close_left

if TYPE_CHECKING:
    from nbpeft.session import Run, Session

INTERRUPT_HINT = "Interrupting the kernel ends the run after this step and keeps the weights trained so far."
_INTERVAL = 0.15
"""The shortest time between two updates, in seconds; below the 0.2 s at which a run publishes, or every second state
would be skipped."""
_SHARE = 100
"""After an update the view waits this many times as long as drawing took: drawing costs at most 1 % of the time."""
_TICK = 1.0
"""Seconds between two updates of the elapsed time."""
_PEEK = 0.1
"""Seconds between two checks for clicks, on kernels where only another thread notices them during a step."""


def show_run(run: Run, session: Session, model_name: str, *, ui: Ui = "auto") -> RunView:
    """Shows a run in the running cell until it ends. Register this function with ``session.on_run``.

    Args:
        run: A run that is about to start.
        session: Publishes the run's states.
        model_name: The run's model in the session.
        ui: How to show it; by default the richest form that works here.

    Returns:
        The view; it closes itself when the run ends.
    """
    key = (id(session), model_name)
    stale = _live.get(key)
    if stale is not None:
        stale.close()
    view = RunView(run, session, model_name, ui=ui)
    _live[key] = view
    view.start()
    return view


class RunView:
    """Draws the states of one run until it has ended. Created by ``show_run``."""

    def __init__(self, run: Run, session: Session, model_name: str, *, ui: Ui = "auto") -> None:
        self._run: Run | None = run
        self._run_id = run.run_id
        self._session = session
        self._model_name = model_name
        self._shown_as = shown_as(ui)
        self._lock = threading.RLock()
        self._drawn: TrainState | None = None
        self._drawn_at = float("-inf")
        self._output: _HtmlOutput | _TextOutput | None = None
        self._buttons: RunButtons | None = None
        self._unsubscribe: Any = None
        self._wait = _INTERVAL
        self._wake = threading.Event()
        self._ticks = False

    def start(self) -> None:
        """Shows the first state and subscribes to the session."""
        run = self._run
        if run is None:
            return
        text = self._shown_as == "text"
        hint = "" if self._shown_as != "html" else " ".join(part for part in (INTERRUPT_HINT, widgets_hint()) if part)
        self._output = _TextOutput() if text else _HtmlOutput(self._model_name, hint)
        run.shown = "text" if text else "card"
        self.draw(run.state)
        if self._run is not None and self._shown_as == "widgets":
            self._buttons = RunButtons(run.control, [member.name for member in run.state.members])
            self._buttons.show()
            if isinstance(self._output, _HtmlOutput):
                self._output.framed_for(self._buttons)
            self.draw(run.state, at_once=True)
        if self._run is not None:
            removals = [self._session.subscribe(self._published), run.control.on_request(self._wake.set)]
            self._unsubscribe = lambda: [remove() for remove in removals]
            self._ticks = True
            # ipykernel 7.0 stores the id of the cell's message in a context variable: without it the output of this
            # thread would go to another cell.
            context = contextvars.copy_context()
            threading.Thread(target=context.run, args=(self._tick,), name="nbpeft-run-view", daemon=True).start()
            here = threading.get_ident()
            if here == threading.main_thread().ident and run.thread in (
                None,
                here,
            ):  # a run in the background outlives the cell
                _after_cell(self._stop_ticking)

    def draw(self, train: TrainState, *, at_once: bool = False) -> None:
        """Draws a state, unless the last one was drawn only just before.

        Args:
            train: The state. A change of its status is always drawn.
            at_once: Whether to draw it however short the time since the last one.
        """
        with self._lock:
            if self._output is None:
                return
            ended = train.status in ENDED
            now = time.monotonic()
            previous = self._drawn
            changed = previous is None or previous.status != train.status
            due = at_once or changed or ended or now - self._drawn_at >= self._wait
            if not due or (train == previous and not self._output.outdated):
                return
            began = time.perf_counter()
            self._output.draw(train)
            self._wait = max(_INTERVAL, _SHARE * (time.perf_counter() - began))
            self._drawn, self._drawn_at = train, now
            if self._buttons is not None:
                self._buttons.sync(member.name for member in train.members)
            if ended:
                self._end(train)

    def close(self, final: str = "") -> None:
        """Stops updating; the last state drawn stays.

        Args:
            final: The card of a run that has ended, as HTML.
        """
        self._stop_ticking()
        with self._lock:
            if self._unsubscribe is not None:
                self._unsubscribe()
            if self._buttons is not None:
                self._buttons.close(final)
            self._unsubscribe = self._buttons = self._output = self._run = None
            key = (id(self._session), self._model_name)
            if _live.get(key) is self:
                del _live[key]

    def _published(self, state: SessionState) -> None:
        run = self._run
        if run is None:
            return
        model = state.model(self._model_name)
        train = model.training if model is not None else None
        # The session has no state of a run on a model without adapters: the run has one.
        self.draw(train if train is not None and train.run_id == self._run_id else run.state)

    def _end(self, train: TrainState) -> None:
        output = self._output
        if isinstance(output, _HtmlOutput):
            # Draw it again when the cell has ended: a server that limits the message rate may have dropped it.
            _after_cell(lambda: output.draw(train))
        self.close(output.card(train) if isinstance(output, _HtmlOutput) else "")

    def _stop_ticking(self) -> None:
        self._ticks = False
        self._wake.set()

    def _tick(self) -> None:
        """Updates the elapsed time and responds to clicks until the run ends, or the cell in which it runs."""
        while self._ticks:
            buttons, run = self._buttons, self._run
            if run is None:
                return
            self._wake.wait(_PEEK if buttons is not None and buttons.needs_peeking else _TICK)
            if buttons is not None and self._ticks:
                buttons.peek()
            clicked = self._wake.is_set()
            self._wake.clear()
            state = run.tick() if self._ticks and self._run is run else None
            if state is None or state.status in ENDED:
                continue
            if clicked or time.monotonic() - self._drawn_at >= _TICK:
                self._draw_between_steps(state)

    def _draw_between_steps(self, state: TrainState) -> None:
        try:
            self.draw(state, at_once=True)
        except Exception:  # the run's own updates report the error
            self._ticks = False


class _HtmlOutput:
    """One display that is updated in place."""

    def __init__(self, model_name: str, hint: str) -> None:
        self._model_name = model_name
        self._hint = hint
        self._handle: Any = None
        self._buttons: RunButtons | None = None
        self._frame = ""

    @property
    def outdated(self) -> bool:
        """Whether the card has to be drawn again to count as current, even if the run's state has not changed."""
        return self._frame != self._frame_now()

    def framed_for(self, buttons: RunButtons) -> None:
        """Marks the card as one with these buttons below it, whose style rules decide whether it counts as current."""
        self._buttons = buttons

    def card(self, train: TrainState, seen: str = "") -> str:
        """A state as HTML.

        Args:
            train: The state.
            seen: The local time at which it is drawn, as text.
        """
        hint = self._hint if train.status not in ENDED else ""
        return to_html(training_card(train, model_name=self._model_name, hint=hint, seen=seen))

    def draw(self, train: TrainState) -> None:
        from IPython.display import display

        seen = time.strftime("%Y-%m-%d %H:%M")
        html, self._frame = self.card(train, seen), self._frame_now()
        if self._frame:
            html = f'<style>{DEAD_WIDGETS}</style><div class="{self._frame}">{html}</div>'
        bundle = {"text/html": html, "text/plain": training_text(train, seen=seen)}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def _frame_now(self) -> str:
        """The class names by which style rules distinguish a current card from an old one; empty without buttons."""
        buttons = self._buttons
        return "" if buttons is None else f"nbpeft-state {buttons.name} {buttons.name}-{buttons.period()}"


class _TextOutput:
    """One line that is overwritten in a terminal; in a file, a new line every ten seconds."""

    seconds = 10.0
    outdated = False

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._width = 0
        self._written_at = float("-inf")

    def draw(self, train: TrainState) -> None:
        line, ended = training_text(train), train.status in ENDED
        if self._stream.isatty():
            columns = shutil.get_terminal_size().columns - 1
            line = (
                line if len(line) <= columns else line[: columns - 1] + "…"
            )  # a line that wraps cannot be overwritten
            self._stream.write(f"\r{line:<{self._width}}" + ("\n" if ended else ""))
            self._width = len(line)
        elif ended or time.monotonic() - self._written_at >= self.seconds:
            self._stream.write(f"{line}\n")
            self._written_at = time.monotonic()
        self._stream.flush()


def _after_cell(act: Callable[[], object]) -> None:
    """Calls a function once, when the running cell has ended."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        return

    def once(*_: object) -> None:
        shell.events.unregister("post_run_cell", once)
        act()

    shell.events.register("post_run_cell", once)


_live: dict[tuple[int, str], RunView] = {}
"""Views of current runs, by session and model. A session has only weak references to its subscribers: this keeps the
views alive."""


def close_views() -> None:
    """Closes all live views; their last states stay."""
    for view in list(_live.values()):
        view.close()
    close_left()
