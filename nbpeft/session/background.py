"""Training in the background: the cell returns, the training goes on in a thread of its own.

    cell       start ── waits until the run begins ── shows it ── returns a BackgroundRun
    thread              data, Trainer ── begin ──┘        └── step ── turns of others ── step ── … ── end

What fails before the run begins fails in the cell. The run is shown by the cell's thread, so that its output is the
cell's. Between two steps other threads may call the model; who would change its adapters gets ``BusyError``.
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

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.display.blocks import Line, bold, dim, line
from nbpeft.session.results.base import Result
from nbpeft.training.monitor.control import RunControl

if TYPE_CHECKING:
    from nbpeft.engine.changes.step_gate import StepGate
    from nbpeft.state import TrainState
    from nbpeft.training import Run, TrainResult

    Work = Callable[["BackgroundTraining"], TrainResult]

_AT_EXIT = 10.0
"""Seconds that the end of the process waits for the step that runs."""


class TurnTakingControl(RunControl):
    """Stop and Pause of a run in the background; others take their turns where these are looked at."""

    def __init__(self, gate: StepGate) -> None:
        super().__init__()
        self._gate = gate

    def _deliver(self) -> None:
        super()._deliver()
        while self._gate.yield_between_steps(lambda: self.stop_requested) and self.paused:
            super()._deliver()  # no step waits for those who come meanwhile


class BackgroundTraining:
    """A training in a thread of its own.

    Attributes:
        description: what runs, e.g. ``training sql``.
        control: Stop and Pause.
        result: how it ended; None before that, and where it failed.
        error: why it failed.
        traceback: of the error, as text.
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
        self._started = self._shown = self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the thread has nothing more to do with the model."""
        return self._ended

    @property
    def state(self) -> TrainState | None:
        """The run now; None before it begins."""
        return self._run.state if self._run is not None else None

    def start(self, work: Work, show: Callable[[Run], object]) -> None:
        """Starts, and returns when the run has begun and is shown; where that is interrupted, ``abandon`` ends it.

        Args:
            work: trains; runs in the thread.
            show: shows the run; called in this thread.

        Raises:
            NbpeftError: what failed before the run began.
        """
        context = contextvars.copy_context()  # output of the thread belongs to the cell that runs now
        thread = threading.Thread(target=context.run, args=(self._work, work), name="nbpeft-training", daemon=True)
        with HeldInterrupts():
            thread.start()
            self._started = True
        with self._condition:
            self._condition.wait_for(lambda: self._run is not None or self._ended)
        if self._run is not None:
            show(self._run)
        self._release()
        if self._run is None and self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Ends a training whose cell does not return, also one whose thread was never started."""
        self.control.request_stop("interrupted")
        self._release()
        if self._started:
            self.join()
        else:
            self._end()

    def begun(self, run: Run) -> None:
        """Called by the thread when its run begins: waits until it is shown."""
        with self._condition:
            self._run = run
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._shown)

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the end; says whether that came about. An interruption ends the waiting alone."""
        with self._condition:
            return self._condition.wait_for(lambda: self._ended, timeout)

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
        except BaseException as error:  # shown in the card, and raised for whoever asks for the result
            self.traceback = "".join(traceback.format_exception(error))
            release_frames(error, everything=True)  # they hold the model
            self.error = error.with_traceback(None)
        finally:
            _live.discard(self)
            self._end()

    def _end(self) -> None:
        self._gate.end()
        with self._condition:
            self._ended = True
            self._condition.notify_all()


@dataclass(frozen=True, repr=False)
class BackgroundRun(Result):
    """A training that goes on while other cells run.

    Attributes:
        model_name: the notebook variable of the model.
        line: what can be done with it.
        training: its thread.
    """

    model_name: str
    line: str
    training: BackgroundTraining = field(repr=False, compare=False)

    @property
    def state(self) -> TrainState | None:
        """The run now."""
        return self.training.state

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return not self.training.ended

    @property
    def result(self) -> TrainResult | None:
        """How it ended; None while it goes on.

        Raises:
            Exception: what it failed with.
        """
        if self.training.error is not None:
            raise self.training.error
        return self.training.result

    def wait(self, timeout: float | None = None) -> TrainResult:
        """Waits for its end; interrupting that leaves the training alone.

        Args:
            timeout: seconds to wait at most; None for as long as it takes.

        Returns:
            How it ended.

        Raises:
            TimeoutError: it still goes on.
            Exception: what it failed with.
        """
        if not self.training.join(timeout):
            raise TimeoutError(f"{self.training.description} goes on")
        result = self.result
        assert result is not None
        return result

    def stop(self) -> None:
        """Asks it to end after the step it is in; it keeps what was learned."""
        self.training.control.request_stop()

    def pause(self) -> None:
        """Asks it to wait after the step it is in."""
        self.training.control.pause()

    def resume(self) -> None:
        """Lets it go on."""
        self.training.control.resume()

    def __str__(self) -> str:
        if self.training.error is not None:
            return f"{self.training.description} failed: {self.training.error}"
        return str(self.training.result or self.line)

    def view(self) -> Line:
        """What can be done with it, or how it ended."""
        return line(dim(self.line)) if self.running else line(bold(str(self)))


_live: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _end_at_exit() -> None:
    """Threads of torch's must not be cut off in the middle of a step."""
    for training in list(_live):
        training.control.request_stop("the kernel was shut down")
        training.join(_AT_EXIT)
