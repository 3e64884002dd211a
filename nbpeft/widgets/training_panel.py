"""The live view of a training run; see ``run_outputs`` for where it is drawn.

    state   the card, at most five times a second; its chart is SVG during the run, an image in the last state
    clicks  Pause, Stop and Save now below it, which are hidden when the run ends

States come from the training thread between steps. A step may take a minute: a separate thread updates the elapsed time
each second and responds to a click at once. After the end the view follows the session, so that the card says whether
the adapter is saved.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbpeft.display.html import to_html
from nbpeft.display.next_steps import NextSteps, next_steps
from nbpeft.display.training import training_card
from nbpeft.state import ENDED, SessionState, TrainState
from nbpeft.widgets.environment import Ui, in_marimo, resender, shown_as, widgets_hint
from nbpeft.widgets.run_buttons import RunButtons
from nbpeft.widgets.run_outputs import HtmlOutput, RunOutput, TextOutput, WidgetOutput

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
MOVED = "The card of this run was opened again in another cell."
_MOST_ENDED = 16
"""The number of ended runs whose cards follow the session."""


def show_run(run: Run, session: Session, model_name: str, *, ui: Ui = "auto") -> RunView:
    """Shows a run in the running cell until it ends. Register this function with ``session.on_run``.

    Returns:
        The view; it closes itself when the run ends.
    """
    key = (id(session), model_name)
    stale = _live.get(key)
    if stale is not None:
        stale.close(MOVED if stale.run_id == run.run_id else "")
    view = RunView(run, session, model_name, ui=ui)
    _live[key] = view
    view.start()
    return view


def show_runs(session: Session, *, ui: Ui = "auto") -> Callable[[], None]:
    """Shows every training that the session starts from now on in the cell that starts it.

    The Jupyter extension does this when it is loaded. Call it in a notebook without magics, such as one of marimo.

    Returns:
        A function that ends it.

    Example:
        >>> import nbpeft
        >>> end = show_runs(nbpeft.get_session())
        >>> end()
    """
    return session.on_run(lambda run, model_name: show_run(run, session, model_name, ui=ui))


class RunView:
    """Draws the states of one run. Created by ``show_run``.

    Attributes:
        run_id: Identifies the run.
    """

    def __init__(self, run: Run, session: Session, model_name: str, *, ui: Ui = "auto") -> None:
        self._run: Run | None = run
        self.run_id = run.run_id
        self._session = session
        self._model_name = model_name
        self._shown_as = shown_as(ui)
        self._lock = threading.RLock()
        self._drawn: TrainState | None = None
        self._drawn_at = float("-inf")
        self._next_steps: NextSteps | None = None
        self._left = ""
        self._output: RunOutput | None = None
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
        run.shown = "text" if self._shown_as == "text" else "card"
        self._output = self._open(run)
        self.draw(run.state)
        if self._shown_as == "text" and run.state.status in ENDED:
            return
        removals = [self._session.subscribe(self._published), run.control.on_request(self._wake.set)]
        self._unsubscribe = lambda: [remove() for remove in removals]
        if run.state.status in ENDED:
            return
        self._ticks = True
        # ipykernel 7.0 stores the id of the cell's message in a context variable: without it the output of this
        # thread would go to another cell.
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._tick,), name="nbpeft-run-view", daemon=True).start()
        here = threading.get_ident()
        # A run in the background outlives the cell.
        if here == threading.main_thread().ident and run.thread in (None, here):
            _after_cell(self._stop_ticking)

    def _open(self, run: Run) -> RunOutput:
        if self._shown_as == "text":
            return TextOutput()
        if self._shown_as == "html":
            return HtmlOutput(self._card)
        self._buttons = RunButtons(run.control, run.state)
        return WidgetOutput(self._card, self._buttons, run.state)

    def _card(self, train: TrainState, seen: str) -> str:
        """A state as HTML."""
        hint = self._left
        if not hint and self._shown_as == "html" and train.status not in ENDED:
            hint = " ".join(part for part in (INTERRUPT_HINT, widgets_hint()) if part)
        in_rows = self._buttons is not None and not seen  # the rows with the buttons have the table's content
        content = training_card(
            train,
            model_name=self._model_name,
            hint=hint,
            seen=seen,
            next_steps=self._next_steps,
            members=not in_rows or train.status in ENDED,
        )
        return to_html(content)

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
            if not due or train == previous:
                return
            if ended:
                self._next_steps = self._following(train, self._session.state)
            began = time.perf_counter()
            self._output.draw(train)
            self._wait = max(_INTERVAL, _SHARE * (time.perf_counter() - began))
            self._drawn, self._drawn_at = train, now
            if self._buttons is not None:
                self._buttons.sync(train)
            if ended and self._run is not None:
                self._end(train)
        resender.drawn(self)

    def resend(self) -> None:
        """Sends the last state again."""
        with self._lock:
            if self._output is not None:
                self._output.resend()

    def close(self, leaving: str = "") -> None:
        """Stops updating; the last state drawn stays.

        Args:
            leaving: A line that is added to it.
        """
        self._stop_ticking()
        with self._lock:
            if self._unsubscribe is not None:
                self._unsubscribe()
            output, self._output, self._left = self._output, None, leaving
            if output is not None:
                if leaving and self._drawn is not None:
                    output.draw(self._drawn)
                output.close()
            self._unsubscribe = self._buttons = self._run = None
            if _live.get(self._key) is self:
                del _live[self._key]

    @property
    def _key(self) -> tuple[int, str]:
        return (id(self._session), self._model_name)

    def _published(self, state: SessionState) -> None:
        run = self._run
        if run is None:
            self._follow(state)
            return
        model = state.model(self._model_name)
        train = model.training if model is not None else None
        # The session has no state of a run on a model without adapters: the run has one.
        self.draw(train if train is not None and train.run_id == self.run_id else run.state)

    def _following(self, train: TrainState, state: SessionState) -> NextSteps | None:
        """What to do after the run; without the commands where there are no magics."""
        steps = next_steps(train, state, self._model_name)
        return replace(steps, commands=()) if steps is not None and in_marimo() else steps

    def _follow(self, state: SessionState) -> None:
        """Draws the card of an ended run again if its adapter was saved, changed or deleted."""
        with self._lock:
            train, output = self._drawn, self._output
            if train is None or output is None:
                return
            following = self._following(train, state)
            if following != self._next_steps:
                self._next_steps = following
                output.draw(train)
                _after_cell(output.flush)  # a program that executes notebooks sees nothing that is sent later
        resender.drawn(self)

    def _end(self, train: TrainState) -> None:
        """Keeps the card of a run that has ended, and nothing else of the run."""
        self._stop_ticking()
        output = self._output
        assert output is not None
        output.end()
        self._buttons = self._run = None
        if _live.get(self._key) is self:
            del _live[self._key]
        if isinstance(output, TextOutput):
            self.close()
            return
        _ended.append(self)
        while len(_ended) > _MOST_ENDED:
            _ended.popleft().close()
        # Draw it again when the cell has ended: a server that limits the message rate may have dropped it.
        _after_cell(lambda: output.draw(train))

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
_ended: deque[RunView] = deque()
"""Views of the last runs that have ended."""


def close_views() -> None:
    """Closes all views; their last states stay."""
    for view in (*_live.values(), *_ended):
        view.close()
    _ended.clear()
