"""One training run as a front end sees it: counts, curves and speed, fed by any loop.

    loop ── run.step(loss) ──> Run ── publish(TrainState), a few times a second ──> panels
      ^                         |
      └──── StopRun ────────────┴── control.wait_or_stop() <── Stop and Pause buttons

Feeding a run costs no device synchronisation: losses stay tensors until the next publication.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from torch import nn

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.errors import ConfigError, TrainingError, TrainingInterrupted
from nbpeft.memory.processor import slow_dtype, slow_dtype_message
from nbpeft.state import Curve, MemberState, MemoryState, Sample, TrainState, TrainStatus
from nbpeft.sweeps import stem_of
from nbpeft.training.adapters.adapted_model import trained_names
from nbpeft.training.adapters.learning_check import LearningCheck
from nbpeft.training.adapters.optimizer_steps import watch_steps
from nbpeft.training.disk.save_now import save_adapters
from nbpeft.training.monitor.control import RunControl
from nbpeft.training.monitor.failures import explain_failure
from nbpeft.training.monitor.record import Number, Record
from nbpeft.training.monitor.tracebacks import release_frames

_NOT_SAVED = "not saved"


class StopRun(BaseException):  # not an Exception: a loop's ``except Exception`` must not swallow it
    """Ends a tracked block after Stop was clicked, or where no step is left; the block's ``with`` swallows it."""

    def __init__(self, run: Run, *, finished: bool = False) -> None:
        super().__init__("the run was stopped")
        self.run = run
        self.finished = finished


class Run:
    """One training run.

    Feed it from your own loop::

        with track(model, total_steps=len(loader)) as run:
            for batch in loader:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(loss, tokens=batch["input_ids"].numel())

    Stop ends the block: the model keeps what it learned, the code after the block goes on, and
    ``run.state.status`` is ``"stopped"``. KeyboardInterrupt ends it in the same order, and leaves it as
    ``TrainingInterrupted``: what comes after it does not run. Other exceptions pass through.

    Args:
        model: The model in training; held weakly.
        total_steps: Optimizer steps planned, or None where that is not known.
        adapter: Name shown; the active adapters by default.
        control: Where Stop and Pause are requested; a new one by default.
        publish: Called with each new state from the training thread, at most once every
            ``interval`` seconds, and always with the last one.
        clock: Seconds, growing.
        memory: Measures memory for the states, at most every ``memory_interval`` seconds and so rarely
            that it takes less than a hundredth of the time. Called in any thread.

    Raises:
        ConfigError: ``total_steps`` is not a number of steps.

    Attributes:
        entered: Whether the run is inside its ``with`` block.
        shown: How a front end shows the run: then warnings are in its message alone.
        interrupted: Whether an interruption ended it.
        thread: Identifier of the thread that began it; None before.
        folder: Where the run is kept on disk, or the empty string.
        output_dir: Where its adapter goes at the end, or the empty string.
        mirrors: Whether it goes on in other processes, whose states it takes over (``mirror``); set before it begins.
        steps_before: Steps that the adapter was trained for in earlier runs, whose weights this one starts from.
        starts_from: That in words; empty for weights that no run has trained.
        members: Says, by the status of the run, how each adapter of a sweep does.
        lost: Why the model has nothing of what was learned, where other processes did it; else the empty string.
        diverged: Why the training diverged, or the empty string.
        kept_step: Step whose weights the model has, where the training diverged later; else None.
    """

    interval = 0.2
    memory_interval = 0.5
    most_samples = 40

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | None,
        *,
        adapter: str | None = None,
        control: RunControl | None = None,
        publish: Callable[[TrainState], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], MemoryState | None] | None = None,
    ) -> None:
        if total_steps is not None and (not isinstance(total_steps, int) or total_steps < 0):
            raise ConfigError(f"total_steps must be a number of steps or None, not {total_steps!r}")
        self.control = control if control is not None else RunControl()
        self.run_id = uuid.uuid4().hex[:8]
        self.adapter = ", ".join(trained_names(model)) if adapter is None else adapter
        self.total_steps = total_steps
        self._model = weakref.ref(model)
        self._publish_to = publish
        self._clock = clock
        self._memory = memory
        self._lock = threading.RLock()
        self._memory_lock = threading.Lock()
        self.entered = self.interrupted = False
        self.thread: int | None = None
        self.shown: Literal["", "text", "card"] = ""
        self.folder = self.output_dir = ""
        self.steps_before, self.starts_from = 0, ""
        self.members: Callable[[TrainStatus], tuple[MemberState, ...]] = lambda status: ()
        self.mirrors = self._came_back = False
        self.lost = ""
        self._mirrored: TrainState | None = None
        self._display_failed = False
        self._status: TrainStatus = "starting"
        self._notes: list[str] = []
        self._severe: set[str] = set()
        self.diverged = ""
        self.kept_step: int | None = None
        self._divergence_noted = False
        self._warnings: list[str] = []
        self._saved = ""
        self._samples: deque[Sample] = deque(maxlen=self.most_samples)
        self._latest: TrainState | None = None
        self._check: LearningCheck | None = None
        self._end_watching: Callable[[], None] = lambda: None
        self._record = Record()
        self._memory_state: MemoryState | None = None
        self._readings: deque[tuple[int, int]] = deque(maxlen=1000)
        self._memory_due = float("-inf")
        self._started: float | None = None
        self._waited = 0.0
        self._waiting_since: float | None = None
        self._ended: float | None = None
        self._published_at = float("-inf")

    # What the loop calls

    def begin(
        self, *, total_steps: int | None = None, step: int = 0, earlier: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Starts the clock; ``with run:`` does it too.

        Args:
            total_steps: Steps planned, once they are known.
            step: Steps done before, in a run that is resumed.
            earlier: What was logged in them, as a Trainer's ``log_history`` has it.
        """
        with self._lock:
            if total_steps is not None:
                self.total_steps = total_steps
            if step:
                self._record.resume(step, earlier)
            if self._status != "starting":
                return
            self._status = "running"
            self.thread = threading.get_ident()
            self._started = self._clock()
            model = self._model()
            if model is not None and not self.mirrors:
                self._check = LearningCheck(model, self.adapter)
                record = self._record  # the hook must not keep a run alive that nobody holds any more
                self._end_watching = watch_steps(model, lambda: record.step)
                weakref.finalize(self, self._end_watching)
                self._warn(self._check.before())
                slow = slow_dtype(model)
                self.note(slow_dtype_message(slow) if slow is not None else "")
        self.publish(force=True)

    def step(
        self,
        loss: Number | None = None,
        *,
        learning_rate: float | None = None,
        tokens: Number | None = None,
        epoch: float | None = None,
        gradient_norm: Number | None = None,
    ) -> None:
        """Notes one optimizer step, and carries out Stop and Pause. Call it after the step.

        Args:
            loss: The step's loss, a number or a tensor with one element.
            learning_rate: As used in the step.
            tokens: Input tokens of the step, for the speed shown.
            epoch: Passes over the data so far.
            gradient_norm: Of the step, before clipping.

        Raises:
            TrainingError: the run is not in a ``with`` block.
        """
        if not self.entered:
            raise TrainingError("A run is fed inside its block: `with track(model) as run:` and then run.step(loss=…).")
        self.record(
            self._record.step + 1,
            loss=loss,
            learning_rate=learning_rate,
            tokens=tokens,
            epoch=epoch,
            gradient_norm=gradient_norm,
        )
        if self.wait_or_stop():
            raise StopRun(self)

    def evaluated(
        self,
        loss: Number | None,
        step: int | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        score: float | None = None,
    ) -> None:
        """Notes what was measured on held-out data.

        Args:
            loss: A number or a tensor with one element, or None.
            step: When it was measured; now by default.
            metrics: Further values by name, e.g. ``{"accuracy": 0.9}``.
            score: What the best evaluation is found by, lower is better; the loss by default.
        """
        with self._lock:
            place = self._record.step if step is None else step
            self._record.add_evaluation(place, None if loss is None else float(loss), metrics or {}, score)
        self.publish()

    def goes_on(self, curves: Mapping[str, Curve], samples: Iterable[Sample]) -> None:
        """Takes over what the run has measured and sampled in an earlier process.

        Args:
            curves: further values over time and metrics, by name.
            samples: the answers.
        """
        with self._lock:
            self._record.take_over(curves)
            self._samples.extend(samples)

    def sampled(self, samples: Iterable[Sample]) -> None:
        """Notes what the model answered; the last ``most_samples`` are kept."""
        with self._lock:
            self._samples.extend(samples)
        self.publish(force=True)

    def record(
        self,
        step: int,
        *,
        loss: Number | None = None,
        learning_rate: float | None = None,
        tokens: Number | None = None,
        epoch: float | None = None,
        gradient_norm: Number | None = None,
    ) -> None:
        """Notes what is known about ``step``; never raises, never waits.

        May be called several times a step, as the parts become known.
        """
        with self._lock:
            advanced = self._record.add(step, loss, learning_rate, tokens, epoch, gradient_norm)
            if advanced and self._check is not None:
                last = self.total_steps is not None and self._record.step >= self.total_steps and not self._resumed
                self._warn(self._check.after_step(self.steps_done, last=last))
        self.publish()

    def note(self, message: str, *, warning: bool = False) -> None:
        """Adds to the line shown with the run; what it says already is not said again.

        Args:
            message: for a person.
            warning: whether it is shown as one: something went wrong, or has to be done.
        """
        with self._lock:
            if message and message not in self._notes:
                self._notes.append(message)
            if message and warning:
                self._severe.add(message)

    def diverge(self, reason: str, kept_step: int, *, put_back: bool = False) -> None:
        """Notes that the training diverged at this step, and with which weights the model is left.

        Args:
            reason: why.
            kept_step: step whose weights it has.
            put_back: whether that is said here; else who puts them back says it.
        """
        with self._lock:
            self.diverged, self.kept_step = reason, kept_step
            self._warnings.append(f"Training stopped: {reason}.")
            self.replaced_weights()
            if put_back:
                self.note(f"{self.weights_of(kept_step)}, the last good ones, were put back", warning=True)

    def weights_of(self, step: int) -> str:
        """The weights of a step in words."""
        return "the weights it began with" if step == self._record.first_step else f"the weights of step {step:,}"

    def replaced_weights(self) -> None:
        """Called when weights that diverged were replaced: what the run sees of them and of the loss says no more."""
        with self._lock:
            self._divergence_noted = True
            if self._check is not None:
                self._check.close()
                self._check = None

    def continue_from(self, steps: int, run_name: str = "") -> None:
        """Says that the weights at its start are those of earlier runs.

        Args:
            steps: How many steps they were trained for; with none, nothing is said.
            run_name: The run that did the last of them.
        """
        self.steps_before = steps
        if steps:
            self.starts_from = f"the weights after step {steps:,}" + (f" of run {run_name}" if run_name else "")
            self.note(f"goes on with {self.starts_from}, with a new schedule")

    def mirror(self, state: TrainState) -> None:
        """Takes over how the run stands in the processes that train, and publishes that.

        Args:
            state: as the first of them published it last.
        """
        with self._lock:
            now = self._clock()
            self._mirrored, self._memory, self._memory_state = state, None, state.memory
            self._record.step, self._record.first_step = state.step, state.first_step
            self.kept_step = state.kept_step
            self.total_steps, self.folder = state.total_steps, state.folder
            self._started, self._waiting_since = now - state.elapsed, now if state.status == "paused" else None
        self.publish(force=True)  # they come as seldom as they are to be shown

    def brought_back(self, token_count: int) -> None:
        """Says that the model has now what was learned in other processes.

        Args:
            token_count: input tokens of all their steps.
        """
        self._record.token_count, self._came_back = token_count, True

    def wait_or_stop(self) -> bool:
        """Waits while paused. Returns whether the loop is to end."""

        def on_wait() -> None:
            self._waiting_since = self._clock()
            self.publish(force=True)

        try:
            stop = self.control.wait_or_stop(on_wait, self._save_now)
        finally:
            waited = self._waiting_since is not None
            with self._lock:
                if self._waiting_since is not None:
                    self._waited += self._clock() - self._waiting_since
                    self._waiting_since = None
                    self._record.forget_pace()
        if waited:
            self.publish(force=True)
        return stop

    def finish(self, status: TrainStatus, message: str = "") -> None:
        """Ends the run and publishes its last state. Only the first call counts.

        Args:
            status: ``"finished"``, ``"stopped"`` or ``"failed"``.
            message: One line for a person, in the place of what was noted before.
        """
        with HeldInterrupts(to_the_end=True):  # a second interruption must not leave it half ended
            with self._lock:
                if self._ended is not None:
                    return
                self._ended = self._clock()
                self._end_watching()
                if self._check is not None:
                    if status == "finished" and self.steps_done and not self._resumed:
                        self._warn(self._check.after_step(self.steps_done, last=True))
                    self._check.close()
                    self._check = None
                self._status = status
                if status == "stopped":
                    self._notes = self._stop_notes()
                elif message:
                    self._notes = [message]
                self._memory_due = float("-inf")
            self.publish(force=True)

    def __enter__(self) -> Self:
        self.entered = True
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.entered = False
        self.interrupted = isinstance(error, KeyboardInterrupt)
        stopped = isinstance(error, StopRun) and error.run is self
        if isinstance(error, StopRun) and stopped and error.finished:
            self.finish("finished")
        elif self.interrupted or stopped or (error is None and self.cut_short):
            if error is not None:
                release_frames(error)
            self.finish("stopped")
            if self.interrupted:
                raise TrainingInterrupted(f"{self.adapter or 'training'} {self.stop_message()}") from None
        elif error is None:
            self.finish("finished")
        else:
            message = explain_failure(error, self._model())
            release_frames(error)
            self.finish("failed", message)
        return stopped

    # What a front end reads

    @property
    def state(self) -> TrainState:
        """The run now. Any thread may ask."""
        with self._lock:
            self._collect()
            return self._build()

    def tick(self) -> TrainState | None:
        """The state of this moment, as far as it is known on the host; None before the first publication.

        Waits neither for the training thread nor for a device: a front end may ask every second while a step
        takes a minute. Losses that are still on a device are those published last.
        """
        if self._ended is None:
            self._measure_memory()
            self._catch_up()
        latest = self._latest
        if latest is None or self._ended is not None:
            return latest
        elapsed = self._elapsed()
        remaining = None if latest.remaining is None else max(0.0, latest.remaining - (elapsed - latest.elapsed))
        return dataclasses.replace(
            latest,
            status=self._status_now(),
            step=latest.step if self._mirrored is not None else self._record.step,
            elapsed=elapsed,
            remaining=remaining,
            memory=self._memory_state,
            message=self._message(),
            warnings=self._severe_notes(),
        )

    def publish(self, *, force: bool = False) -> None:
        """Hands the state to ``publish``, unless that was done less than ``interval`` ago."""
        with self._lock:
            now = self._clock()
            if not force and now - self._published_at < self.interval:
                return
            self._published_at = now
            self._collect()
            self._record.mark(self._elapsed())
            _, speed = self._record.pace(self._elapsed(), overall=False)
            if speed is not None and self._ended is None:
                self._record.trace("tokens/s", speed)
            self._measure_memory()
            state = self._build()
        if self._publish_to is not None:
            try:
                self._publish_to(state)
            except Exception as error:  # a panel that cannot draw must not end a training
                self._warn_once(f"The display of this run fails ({type(error).__name__}: {error}); training goes on.")
        said, self._warnings = self._warnings, []
        for message in said if not self.shown else ():
            warnings.warn(message, stacklevel=3)

    def stop_message(self) -> str:
        """``stopped at step 12``, with the reason where one was given."""
        return " · ".join(self._notes if self._ended is not None else self._stop_notes())

    def _stop_notes(self) -> list[str]:
        """What is noted with the run once it is stopped: that first, unless the processes that trained say it."""
        if self._mirrored is not None and self._mirrored.status == "stopped":
            return [*self._notes, *([self._mirrored.message] if self._mirrored.message else [])]
        reason = self.diverged or self.control.reason
        first = f"stopped at step {self._record.step:,}" + (f": {reason}" if reason else "")
        if self.diverged:
            self._severe.add(first)
        return [first, *self._notes]

    @property
    def label(self) -> str:
        """What it is called on disk: as its adapter, or as what the adapters of a sweep have in common."""
        names = [member.name for member in self.members("running")]
        return f"{stem_of(names)}-sweep".strip("-") if names else self.adapter

    @property
    def elapsed(self) -> float:
        """Seconds since the start, without pauses."""
        with self._lock:
            return self._elapsed()

    @property
    def token_count(self) -> int:
        """Input tokens seen so far."""
        with self._lock:
            self._collect()
            return int(self._record.token_count)

    @property
    def steps_done(self) -> int:
        """Optimizer steps of this run that the model's weights have, those of one that it resumes left out."""
        if self.mirrors and not self._came_back:
            return 0
        done = self._record.step if self.kept_step is None else self.kept_step
        return done - self._record.first_step

    @property
    def cut_short(self) -> bool:
        """Whether the run ends, or has ended, before its last step because a stop was requested, or it diverged."""
        stops = self.control.stop_requested and (self.total_steps is None or self._record.step < self.total_steps)
        return stops or bool(self.diverged)

    # Inside

    @property
    def _resumed(self) -> bool:
        """Whether it goes on from an earlier run, whose last learning rate, often zero, is that of its first step."""
        return self._record.first_step > 0

    def _elapsed(self) -> float:
        if self._started is None:
            return 0.0
        stands = self._ended if self._ended is not None else self._waiting_since
        return (self._clock() if stands is None else stands) - self._started - self._waited

    def _collect(self) -> None:
        while self._readings:
            step, byte_count = self._readings.popleft()
            self._record.trace("memory", byte_count, step)
        lost = self._record.collect()
        if lost is not None and not self._divergence_noted and not any("NaN" in note for note in self._notes):
            self._warn(f"The loss is NaN since step {lost}: try a lower learning rate, or look at the labels.")

    def _catch_up(self) -> None:
        """Takes in what came too soon after the last publication to be published, where nothing waits for it."""
        latest = self._latest
        if latest is None or latest.step == self._record.step or not self._lock.acquire(blocking=False):
            return
        try:
            if self._record.on_host:
                self._collect()
                self._build()
        finally:
            self._lock.release()

    def _save_now(self) -> None:
        try:
            place, control = self.output_dir or self.folder, self.control
            options = {"together": control.reaches_all, "write": control.writes}
            folder = save_adapters(self._model(), place, self._record.step, **options)
            self._saved = f"saved in {folder}"
        except Exception as error:  # a full disk, say: training goes on
            self._saved = f"{_NOT_SAVED}: {error}"
        self.publish(force=True)

    def _measure_memory(self) -> None:
        """Measures where it is time, in whatever thread; one that comes while another measures goes on."""
        now = self._clock()
        if self._memory is None or now < self._memory_due or not self._memory_lock.acquire(blocking=False):
            return
        try:
            began = time.perf_counter()
            found = self._memory()
            self._memory_due = now + max(self.memory_interval, 100 * (time.perf_counter() - began))
            if found is not None:
                self._memory_state = found
                self._readings.append((self._record.step, sum(part.byte_count for part in found.parts)))
        except Exception as error:  # nor must a measurement
            if isinstance(error, RuntimeError) and "during iteration" in str(error):
                return  # the optimizer's first step makes its state right now
            self._memory = None
            self._warn_once(f"Memory cannot be measured ({type(error).__name__}: {error}); training goes on.")
        finally:
            self._memory_lock.release()

    def _status_now(self) -> TrainStatus:
        if self._status != "running":
            return self._status
        if self.control.stop_requested:
            return "stopping"
        if self.control.paused:
            return "paused" if self.control.waiting else "pausing"
        return "running"

    def _message(self) -> str:
        if self._mirrored is not None and self._status not in ("failed", "stopped"):
            theirs = self._mirrored.message
            return " · ".join([*(note for note in self._notes if note not in theirs), theirs]).strip(" ·")
        saving = "saving after this step" if self.control.save_requested and self._ended is None else self._saved
        return " · ".join([*self._notes, *([saving] if saving else [])])

    def _severe_notes(self) -> tuple[str, ...]:
        """What of the message is a warning."""
        mirrored = () if self._mirrored is None else self._mirrored.warnings
        own = [note for note in self._notes if note in self._severe]
        return tuple(dict.fromkeys([*own, *([self._saved] if self._saved.startswith(_NOT_SAVED) else []), *mirrored]))

    def _build(self) -> TrainState:
        if self._mirrored is not None:
            self._latest = dataclasses.replace(
                self._mirrored,
                run_id=self.run_id,
                status=self._status_now(),
                elapsed=self._elapsed(),
                remaining=None if self._ended is not None else self._mirrored.remaining,
                message=self._message(),
                warnings=self._severe_notes(),
            )
            return self._latest
        record, elapsed = self._record, self._elapsed()
        pace, tokens_per_second = record.pace(elapsed, overall=self._ended is not None)
        remaining = None
        if pace is not None and self.total_steps is not None and self._ended is None:
            remaining = max(0.0, (self.total_steps - record.step) * pace)
        self._latest = TrainState(
            run_id=self.run_id,
            adapter=self.adapter,
            status=self._status_now(),
            step=record.step,
            total_steps=self.total_steps,
            epoch=record.epoch,
            loss=record.loss,
            mean_loss=record.mean_loss,
            smoothed_loss=record.smoothed.value,
            eval_loss=record.evaluated[1] if record.evaluated else None,
            eval_step=record.evaluated[0] if record.evaluated else None,
            learning_rate=record.learning_rate,
            tokens_per_second=tokens_per_second,
            elapsed=elapsed,
            remaining=remaining,
            history=record.history.points(),
            eval_history=record.eval_history.points(),
            memory=self._memory_state,
            message=self._message(),
            warnings=self._severe_notes(),
            kept_step=self.kept_step,
            first_step=record.first_step,
            gradient_norm=record.gradient_norm,
            series={name: curve.points() for name, curve in list(record.series.items())},
            metrics=dict(record.metrics),
            metric_history={name: curve.points() for name, curve in record.metric_history.items()},
            best_step=record.best[0] if record.best else None,
            samples=tuple(self._samples),
            folder=self.folder,
            members=self.members(self._status_now()),
        )
        return self._latest

    def _warn(self, message: str) -> None:
        if message:
            self.note(message, warning=True)
            self._warnings.append(message)  # said by the next publication, where nothing shows the run

    def _warn_once(self, message: str) -> None:
        if not self._display_failed:
            self._display_failed = True
            warnings.warn(message, stacklevel=3)


def track(
    model: nn.Module,
    total_steps: int | None = None,
    *,
    publish: Callable[[TrainState], None] | None = None,
    control: RunControl | None = None,
    **options: Any,
) -> Run:
    """A run for your own training loop; see :class:`Run` for how to feed it.

    Args:
        model: The model in training.
        total_steps: Optimizer steps planned, or None where that is not known.
        publish: Called with each new state.
        control: Where Stop and Pause are requested.
        **options: Further arguments of :class:`Run`.
    """
    return Run(model, total_steps, publish=publish, control=control, **options)
