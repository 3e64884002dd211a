"""Training in the background: the cell returns, and the training continues in its own thread.

    cell       start ── waits until the run begins ── shows it ── returns a BackgroundRun
    thread              data, Trainer ── begin ──┘        └── step ── calls of others ── step ── … ── end

An error before the run begins is raised in the cell. The cell's thread displays the run, so that its output belongs to
the cell. Other threads may call the model between two steps; changing its adapters raises ``BusyError``.
"""

from __future__ import annotations

import atexit
import contextvars
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.display.blocks import Line, bold, dim, line
from nbpeft.jsonable import as_json
from nbpeft.session.results.base import Result
from nbpeft.training.monitor.control import RunControl

if TYPE_CHECKING:
    from nbpeft.engine.changes.step_gate import StepGate
    from nbpeft.state import TrainState
    from nbpeft.training import Run, TrainResult

    Work = Callable[["BackgroundTraining"], TrainResult]

_AT_EXIT = 10.0
"""Seconds that the end of the process waits for the current step."""


class TurnTakingControl(RunControl):
    """Stop and Pause of a run in the background; other threads may use the model wherever these are checked."""

    def __init__(self, gate: StepGate) -> None:
        super().__init__()
        self._gate = gate

    def _deliver(self) -> None:
        super()._deliver()
        while self._gate.yield_between_steps(lambda: self.stop_requested) and self.paused:
            super()._deliver()  # while paused, let further threads use the model


class BackgroundTraining:
    """A training in its own thread.

    Attributes:
        description: description of the training, e.g. ``training sql``.
        control: Stop and Pause.
        result: the result; None before the end, or if it failed.
        error: the error with which it failed.
        ended: whether the thread no longer uses the model.
        traceback: traceback of the error, as text.
    """

    def __init__(self, description: str, gate: StepGate) -> None:
        self.description = description
        self.control = TurnTakingControl(gate)
        self.result: TrainResult | None = None
        self.error: BaseException | None = None
        self.traceback = ""
        self._gate = gate
        self._condition = threading.Condition()
        self._run: Run | None = None
        self._started = self._shown = self.ended = False

    @property
    def state(self) -> TrainState | None:
        """The current state of the run; None before it begins."""
        return self._run.state if self._run is not None else None

    def start(self, work: Work, show: Callable[[Run], object]) -> None:
        """Starts the thread, and returns when the run has begun and is displayed.

        ``work`` runs the training in the new thread, ``show`` displays the run in this one.

        If this is interrupted, the caller must call ``abandon``.

        Raises:
            NbpeftError: the error with which it failed before the run began.
        """
        context = contextvars.copy_context()  # so that the thread's output appears in the current cell
        thread = threading.Thread(target=context.run, args=(self._work, work), name="nbpeft-training", daemon=True)
        with DeferredInterrupts():
            thread.start()
            self._started = True
        with self._condition:
            self._condition.wait_for(lambda: self._run is not None or self.ended)
        if self._run is not None:
            show(self._run)
        self._release()
        if self._run is None and self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Ends a training whose cell was interrupted, even if its thread was never started."""
        self.control.request_stop("interrupted")
        self._release()
        if self._started:
            self.join()
        else:
            self._end()

    def begun(self, run: Run) -> None:
        """Called by the thread when its run begins; waits until the run is displayed."""
        with self._condition:
            self._run = run
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._shown)

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the end.

        An interruption ends only the wait.

        Args:
            timeout: maximal time in seconds; None for no limit.

        Returns:
            Whether the training has ended.
        """
        with self._condition:
            return self._condition.wait_for(lambda: self.ended, timeout)

    def _release(self) -> None:
        with self._condition:
            self._shown = True
            self._condition.notify_all()

    def _work(self, work: Work) -> None:
        from nbpeft.training.monitor.tracebacks import release_frames

        _live.add(self)
        self._gate.acquire()
        try:
            self.result = work(self)
        except BaseException as error:  # displayed in the card, and raised by BackgroundRun.result
            self.traceback = "".join(traceback.format_exception(error))
            release_frames(error, everything=True)  # frames reference the model
            self.error = error.with_traceback(None)
        finally:
            _live.discard(self)
            self._end()

    def _end(self) -> None:
        self._gate.end()
        with self._condition:
            self.ended = True
            self._condition.notify_all()


@dataclass(frozen=True, repr=False)
class BackgroundRun(Result):
    """A training that continues while other cells run.

    Attributes:
        model_name: the notebook variable of the model.
        line: text that says how to control it.
        training: its thread.
    """

    model_name: str
    line: str
    training: BackgroundTraining = field(repr=False, compare=False)

    @property
    def state(self) -> TrainState | None:
        """The current state of the run."""
        return self.training.state

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return not self.training.ended

    @property
    def result(self) -> TrainResult | None:
        """The result; None while it still runs.

        Raises:
            Exception: the error with which it failed.
        """
        if self.training.error is not None:
            raise self.training.error
        return self.training.result

    def wait(self, timeout: float | None = None) -> TrainResult:
        """Waits for the end; interrupting the wait does not affect the training.

        Args:
            timeout: maximal time in seconds; None for no limit.

        Returns:
            The result.

        Raises:
            TimeoutError: it still runs.
            Exception: the error with which it failed.
        """
        if not self.training.join(timeout):
            raise TimeoutError(f"{self.training.description} is still running")
        result = self.result
        assert result is not None
        return result

    def stop(self) -> None:
        """Requests the training to end after the current step; what was learned remains."""
        self.training.control.request_stop()

    def pause(self) -> None:
        """Requests the training to wait after the current step."""
        self.training.control.pause()

    def resume(self) -> None:
        """Continues a paused training."""
        self.training.control.resume()

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON types, with ``running`` and the current ``state``."""
        return {**super().to_dict(), "running": self.running, "state": as_json(self.state)}

    def __str__(self) -> str:
        if self.training.error is not None:
            return f"{self.training.description} failed: {self.training.error}"
        return str(self.training.result or self.line)

    def view(self) -> Line:
        """Shows how to control it, or the result."""
        return line(dim(self.line)) if self.running else line(bold(str(self)))


_live: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _end_at_exit() -> None:
    """Stops trainings before the process ends, because torch's threads must not be killed in the middle of a step."""
    for training in list(_live):
        training.control.request_stop("the kernel was shut down")
        training.join(_AT_EXIT)
