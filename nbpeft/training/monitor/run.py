"""One training run for front ends: counts, curves and speed, fed by any loop.

    loop ── run.step(loss) ──> Run ── publish(TrainState), a few times a second ──> panels
      ^                         |
      └──── StopRun ────────────┴── control.wait_or_stop() <── Stop and Pause buttons

Feeding a run does not synchronize with the device: losses stay tensors until the next publication.
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
from numbers import Real
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor, nn

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.errors import ConfigError, TrainingError, TrainingInterrupted, with_article
from nbpeft.memory.processor import slow_dtype, slow_dtype_message
from nbpeft.runs.record import words_of_run
from nbpeft.state import Curve, MemberState, MemoryState, NamedRows, Sample, TrainState, TrainStatus
from nbpeft.sweeps import stem_of
from nbpeft.training.adapters.adapted_model import trained_names
from nbpeft.training.adapters.learning_check import LearningCheck
from nbpeft.training.adapters.optimizer_steps import watch_steps
from nbpeft.training.disk.save_now import save_adapters
from nbpeft.training.monitor.control import RunControl
from nbpeft.training.monitor.failures import explain_failure
from nbpeft.training.monitor.memory_meter import MemoryMeter
from nbpeft.training.monitor.record import OF_STEPS, Number, Record
from nbpeft.training.monitor.stopwatch import Stopwatch
from nbpeft.training.monitor.tracebacks import release_frames

if TYPE_CHECKING:
    from nbpeft.training.data import HeldOut

_NOT_SAVED = "not saved"


class StopRun(BaseException):  # not an Exception: a loop's ``except Exception`` must not swallow it
    """Ends a tracked block after Stop, or when no step is left; the ``with`` of the block swallows it."""

    def __init__(self, run: Run, *, finished: bool = False) -> None:
        super().__init__("the run was stopped")
        self.run = run
        self.finished = finished


class Run:
    """One training run.

    Feed it from your own loop::

        with start_run(model, total_steps=len(loader)) as run:
            for batch in loader:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(loss, tokens=batch["input_ids"].numel())

    Stop ends the block: the model keeps the weights trained so far, the code after the block runs, and
    ``run.state.status`` is ``"stopped"``. KeyboardInterrupt ends it in the same way, but is raised again as
    ``TrainingInterrupted``: the code after the block does not run. Other exceptions pass through.

    Args:
        model: The model in training; the run has only a weak reference to it.
        total_steps: The number of optimizer steps planned, or None if it is unknown.
        adapter: The name to show; by default the names of the active adapters.
        control: Receives requests to stop and pause; a new one by default.
        publish: Called with each new state from the training thread, at most once every
            ``interval`` seconds, and always with the last one.
        clock: Returns monotonic time in seconds.
        memory: Measures memory for the states, at most every ``memory_interval`` seconds and for at most
            1 % of the time. Called in any thread.

    Raises:
        ConfigError: ``total_steps`` is not a number of steps.

    Attributes:
        adapters: The names of its adapters; a sweep that clones one adds to them.
        entered: Whether the run is inside its ``with`` block.
        shown: How a front end shows the run, if it does: then warnings are part of its message and not emitted.
        interrupted: Whether an interrupt ended it.
        thread: Identifier of the thread that began it; None before.
        folder: The folder of the run on disk, or the empty string.
        kept_id: The id of the run in that folder, which is that of the first run if this one resumes it.
        output_dir: The folder in which its adapter is saved at the end, or the empty string.
        rows: The rows to score its adapter on, as a cell named them.
        spelled: Writes a note in the notation in which the training was requested, e.g. with the options of a cell.
        unlearned: Adapter -> which rows of its data are held out, where this is known; "" for all adapters.
        mirrors: Whether it runs in other processes, whose states it shows (``mirror``); set before it begins.
        earlier: Adapter -> the last step of the earlier run in which its initial weights were trained, and its id.
        starts_from: The same as text; empty for weights that no run has trained.
        members: Returns, for a status of the run, the state of each adapter of a sweep.
        check_clone: Refuses to clone an adapter of a sweep with these fields of its own.
        lost: Why the model did not receive the weights that other processes trained; else the empty string.
        touched: Whether an optimizer step has begun to change the weights, which may be the one that did not end.
        diverged: Why the training diverged, or the empty string.
        kept_step: The step whose weights were restored after divergence; else None.
        restored_step: The step whose weights were restored at the end because they are the best; else None.
        headline: The curves by which it is judged, from its objective; set before it begins.
    """

    interval = 0.2
    memory_interval = 0.5
    most_samples = 40
    most_rewarded = 20

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
        self.adapters = trained_names(model) if adapter is None else (adapter,)
        self.total_steps = total_steps
        self._model = weakref.ref(model)
        self._publish_to = publish
        self._clock = clock
        self._lock = threading.RLock()
        self._stopwatch = Stopwatch(clock)
        self._memory = MemoryMeter(memory, clock, self.memory_interval)
        self.entered = self.interrupted = False
        self.thread: int | None = None
        self.shown: Literal["", "text", "card"] = ""
        self.folder = self.kept_id = self.output_dir = ""
        self.rows = NamedRows()
        self.spelled: Callable[[str], str] = str
        self.unlearned: Mapping[str, HeldOut] = {}
        self.earlier, self.starts_from = dict[str, tuple[int, str]](), ""
        self.members: Callable[[TrainStatus], tuple[MemberState, ...]] = lambda status: ()
        self.check_clone: Callable[[str, Mapping[str, Any]], None] = lambda name, fields: None
        self.mirrors = self._has_weights = False
        self.lost = ""
        self.touched = False
        self.headline: tuple[str, ...] = ("loss",)
        self._mirrored: TrainState | None = None
        self._display_failed = False
        self._status: TrainStatus = "starting"
        self._notes: list[str] = []
        self._severe: dict[str, Literal["warning", "error"]] = {}
        self.diverged = ""
        self.kept_step: int | None = None
        self.restored_step: int | None = None
        self._divergence_noted = self._rise_noted = False
        self._warnings: list[str] = []
        self._saved = ""
        self._samples: deque[Sample] = deque(maxlen=self.most_samples)
        self._rewarded: deque[Sample] = deque(maxlen=self.most_rewarded)
        self._latest: TrainState | None = None
        self._check: LearningCheck | None = None
        self._end_watching: Callable[[], None] = lambda: None
        self._record = Record()
        self._published_at = float("-inf")

    @property
    def adapter(self) -> str:
        """The names of its adapters, as text."""
        return ", ".join(self.adapters)

    # What the loop calls

    def begin(
        self, *, total_steps: int | None = None, step: int = 0, earlier: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Starts the clock; ``with run:`` does it too.

        Args:
            total_steps: The number of steps planned, if it is known by now.
            step: Steps done before a resumed run.
            earlier: What was logged in them, in the form of a Trainer's ``log_history``.
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
            self._stopwatch.start()
            model = self._model()
            if model is not None and not self.mirrors:
                self._check = LearningCheck(model, self.adapter, rewarded="loss" not in self.headline)
                record = self._record  # not self: the hook must not keep the run alive
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
        **metrics: Number,
    ) -> None:
        """Records one optimizer step, and carries out Stop and Pause. Call it after the step.

        Args:
            loss: The step's loss, a number or a tensor with one element.
            learning_rate: The learning rate of the step.
            tokens: The number of input tokens of the step, for the speed shown.
            epoch: The number of epochs done, with a fraction.
            gradient_norm: The norm of the gradients, before clipping.
            **metrics: Metrics of your own, by name, each a number or a tensor with one element, e.g. ``accuracy=0.9``.

        Raises:
            TrainingError: the run is not in a ``with`` block.
            ConfigError: a metric is no number, or has the name of a value that runs have.
            StopRun: Stop was requested; the ``with`` block of the run handles it.
        """
        if not self.entered:
            raise TrainingError("run.step(loss=…) is only possible inside the block `with start_run(model) as run:`.")
        _check_metrics(metrics)
        self.record(
            self._record.step + 1,
            loss=loss,
            learning_rate=learning_rate,
            tokens=tokens,
            epoch=epoch,
            gradient_norm=gradient_norm,
            metrics=metrics,
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
        """Records an evaluation.

        Args:
            loss: The loss on the evaluation data, a number or a tensor with one element, or None.
            step: The step at which it was made; the current one by default.
            metrics: Further metrics, by name, e.g. ``{"accuracy": 0.9}``.
            score: The score by which the best evaluation is found, lower is better; the loss by default.
        """
        with self._lock:
            at_step = self._record.step if step is None else step
            self._record.add_evaluation(at_step, None if loss is None else float(loss), metrics or {}, score)
        self.publish()

    def restore_curves(self, curves: Mapping[str, Curve], samples: Iterable[Sample]) -> None:
        """Restores the curves and samples of a resumed run.

        Args:
            curves: curves and metrics, by name.
            samples: the sampled answers.
        """
        with self._lock:
            self._record.take_over(curves)
            for sample in samples:
                (self._samples if sample.reward is None else self._rewarded).append(sample)

    def rewarded(self, samples: Iterable[Sample]) -> None:
        """Adds completions with their rewards; the last ``most_rewarded`` are kept."""
        with self._lock:
            self._rewarded.extend(samples)

    def sampled(self, samples: Iterable[Sample]) -> None:
        """Adds sampled answers; the last ``most_samples`` are kept."""
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
        metrics: Mapping[str, Number] | None = None,
    ) -> None:
        """Records what is known about a step; never raises and never waits for a device.

        May be called several times for a step, as the values become known.

        Args:
            step: The number of optimizer steps done.
            loss: See ``step``.
            learning_rate: See ``step``.
            tokens: See ``step``; the counts of several calls are added.
            epoch: See ``step``.
            gradient_norm: See ``step``.
            metrics: Further values of the step, by name.
        """
        with self._lock:
            advanced = self._record.add(step, loss, learning_rate, tokens, epoch, gradient_norm, metrics)
            if advanced and self._check is not None:
                last = self.total_steps is not None and self._record.step >= self.total_steps and not self._resumed
                self._warn(self._check.after_step(self.steps_done, last=last))
        self.publish()

    def trace(self, values: Mapping[str, float], step: int) -> None:
        """Adds values to further curves.

        Args:
            values: name of the curve -> value.
            step: the step to which they belong.
        """
        with self._lock:
            for name, value in values.items():
                self._record.trace(name, value, step)

    def note(self, message: str, *, warning: bool = False, error: bool = False) -> None:
        """Adds a note to the line shown with the run, unless it is there already.

        Args:
            message: the note.
            warning: whether to show it as a warning: something went wrong, or the user has to act.
            error: whether to show it as an error: the training diverged.
        """
        with self._lock:
            message = self.spelled(message)
            if message and message not in self._notes:
                self._notes.append(message)
            if message and (warning or error):
                self._severe[message] = "error" if error else "warning"

    def diverge(self, reason: str, kept_step: int, *, restored: bool = False) -> None:
        """Records that the training diverged at this step, and which weights the model has now.

        Args:
            reason: why it diverged.
            kept_step: the step whose weights the model has.
            restored: whether to add a note about the restored weights; otherwise the caller adds one.
        """
        with self._lock:
            self.diverged, self.kept_step = reason, kept_step
            self._warnings.append(f"Training stopped: {reason}.")
            self.replaced_weights()
            if restored:
                self.note(f"{self.weights_of(kept_step)}, the last good ones, were restored", error=True)

    def weights_of(self, step: int) -> str:
        """The weights of a step, as text."""
        return "the initial weights" if step == self._record.first_step else f"the weights of step {step:,}"

    def replaced_weights(self) -> None:
        """Ends the checks of weights and loss, after diverged weights were replaced."""
        with self._lock:
            self._divergence_noted = True
            if self._check is not None:
                self._check.close()
                self._check = None

    def kept_in(self, folder: str, kept_id: str) -> None:
        """Records in which folder the run is, and its id there; both are empty if it is in none."""
        self.folder, self.kept_id = folder, kept_id

    def continue_from(self, earlier: Mapping[str, tuple[int, str]], names: Mapping[str, str]) -> None:
        """Records that initial weights were trained in earlier runs.

        Args:
            earlier: adapter -> the last step of the last of them, and its id; 0 for new weights.
            names: id -> the run's present name, which is empty if it is not on disk.
        """
        self.earlier = dict(earlier)
        if any(step for step, _ in earlier.values()):
            starts = {
                name: f"the weights after step {step:,} of {words_of_run(run, names[run])}" if step else "new weights"
                for name, (step, run) in earlier.items()
            }
            alike = len({*starts.values()}) == 1
            self.starts_from = next(iter(starts.values())) if alike else "; ".join(map(": ".join, starts.items()))
            self.note(f"continues from {self.starts_from} (new learning-rate schedule)")

    def mirror(self, state: TrainState) -> None:
        """Takes over the state of the run from the processes that train, and publishes it.

        Args:
            state: the last state that rank 0 published.
        """
        with self._lock:
            self._mirrored = state
            self._memory.mirror(state.memory)
            self._stopwatch.mirror(state.elapsed, paused=state.status == "paused")
            self._record.step, self._record.first_step = state.step, state.first_step
            self.kept_step, self.total_steps = state.kept_step, state.total_steps
            self.kept_in(state.folder, state.kept_id)
        self.publish(force=True)  # rank 0 limits the rate already

    def received_weights(self, token_count: int) -> None:
        """Records that the model has received the weights trained in other processes.

        Args:
            token_count: the number of input tokens of all steps.
        """
        self._record.done_tokens, self._has_weights = token_count, True

    def wait_or_stop(self) -> bool:
        """Waits while paused; returns whether the loop should end."""

        def on_wait() -> None:
            self._stopwatch.pause()
            self.publish(force=True)

        try:
            stop = self.control.wait_or_stop(on_wait, self._save_now)
        finally:
            with self._lock:
                waited = self._stopwatch.resume()
                if waited:
                    self._record.forget_pace()
        if waited:
            self.publish(force=True)
        return stop

    def finish(self, status: TrainStatus, message: str = "") -> None:
        """Ends the run and publishes its last state. Only the first call counts.

        Args:
            status: ``"finished"``, ``"stopped"`` or ``"failed"``.
            message: A one-line message that replaces the notes.
        """
        with DeferredInterrupts(to_the_end=True):  # a second interrupt must not leave the run in between
            with self._lock:
                if self._stopwatch.has_stopped:
                    return
                self._stopwatch.stop()
                self._end_watching()
                if self._check is not None:
                    if status == "finished" and self.steps_done and not self._resumed:
                        self._warn(self._check.after_step(self.steps_done, last=True))
                    self._check.close()
                self._status = status
                if status == "stopped":
                    self._notes = self._stop_notes()
                elif message:
                    self._notes = [message]
                self._memory.measure_next()
            self.publish(force=True)

    def __enter__(self) -> Self:
        self.entered = True
        try:
            self.begin()
        except BaseException as error:  # no block follows that would end the run
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        with DeferredInterrupts(to_the_end=True):  # one that comes now must not leave a run that never ends
            stopped = self._end(error)
        if self.interrupted:
            raise TrainingInterrupted(f"{self.adapter or 'training'} {self.stop_message()}") from None
        return stopped

    def _end(self, error: BaseException | None) -> bool:
        """Ends the run as its block ended; returns whether that was by Stop."""
        self.entered = False
        self.interrupted = isinstance(error, KeyboardInterrupt)
        stopped = isinstance(error, StopRun) and error.run is self
        if isinstance(error, StopRun) and stopped and error.finished:
            self.finish("finished")
        elif self.interrupted or stopped or (error is None and self.cut_short):
            if error is not None:
                release_frames(error)
            self.finish("stopped")
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
        """The current state of the run. May be read in any thread; waits for losses on a device."""
        with self._lock:
            self._collect()
            return self._build()

    def tick(self) -> TrainState | None:
        """The current state without waiting for a device; None before the first publication.

        Does not wait for the training thread either: a front end may call it every second while a step
        takes a minute. Losses that are still on a device appear with their last published values.
        """
        if not self._stopwatch.has_stopped:
            self._measure_memory()
            self._catch_up()
        latest = self._latest
        if latest is None or self._stopwatch.has_stopped:
            return latest
        elapsed = self._stopwatch.elapsed
        remaining = None if latest.remaining is None else max(0.0, latest.remaining - (elapsed - latest.elapsed))
        return dataclasses.replace(
            latest,
            status=self._status_now(),
            step=latest.step if self._mirrored is not None else self._record.step,
            elapsed=elapsed,
            remaining=remaining,
            memory=self._memory.state,
            message=self._message(),
            warnings=self._severe_notes("warning"),
            errors=self._severe_notes("error"),
        )

    def publish(self, *, force: bool = False) -> None:
        """Passes the state to the ``publish`` function, at most once every ``interval`` seconds.

        Args:
            force: whether to publish however short the time since the last state.
        """
        with self._lock:
            now = self._clock()
            if not force and now - self._published_at < self.interval:
                return
            self._published_at = now
            self._measure_memory()
            self._collect()
            self._record.mark(self._stopwatch.elapsed)
            _, speed = self._record.pace(self._stopwatch.elapsed, overall=False)
            if speed is not None and not self._stopwatch.has_stopped:
                self._record.trace("tokens/s", speed)
            state = self._build()
        if self._publish_to is not None:
            try:
                self._publish_to(state)
            except Exception as error:  # a panel that cannot draw must not end a training
                self._warn_once(
                    f"The display of this run failed ({type(error).__name__}: {error}); training continues."
                )
        pending, self._warnings = self._warnings, []
        for message in pending if not self.shown else ():
            warnings.warn(message, stacklevel=3)

    def stop_message(self) -> str:
        """``stopped at step 12``, with the reason if there is one."""
        return " · ".join(self._notes if self._stopwatch.has_stopped else self._stop_notes())

    def _stop_notes(self) -> list[str]:
        """The notes of a stopped run: first where it stopped, unless that is in the message of the other processes."""
        if self._mirrored is not None and self._mirrored.status == "stopped":
            return [*self._notes, *([self._mirrored.message] if self._mirrored.message else [])]
        reason = self.diverged or self.control.reason
        first = f"stopped at step {self._record.step:,}" + (f": {reason}" if reason else "")
        if self.diverged:
            self._severe[first] = "error"
        return [first, *self._notes]

    @property
    def label(self) -> str:
        """Its name on disk: that of its adapters, or the common beginning of the names of a sweep's adapters."""
        members = self.members("running")
        stem = stem_of(member.name for member in members if member.comparable)
        return f"{stem}-sweep" if stem else ", ".join(member.name for member in members) or self.adapter

    @property
    def elapsed(self) -> float:
        """Seconds since the start, without pauses."""
        with self._lock:
            return self._stopwatch.elapsed

    @property
    def token_count(self) -> int:
        """The number of input tokens so far."""
        with self._lock:
            self._collect()
            return int(self._record.token_count)

    @property
    def steps_done(self) -> int:
        """The number of steps of this run that the model's weights include, without those before it was resumed."""
        if self.mirrors and not self._has_weights:
            return 0
        done = self._record.step if self.kept_step is None else self.kept_step
        return done - self._record.first_step

    @property
    def learned(self) -> bool:
        """Whether the weights may be others than before this run."""
        return self.steps_done > 0 or (self.touched and self.kept_step is None)

    @property
    def cut_short(self) -> bool:
        """Whether the run ends, or has ended, before its last step, because of a stop request or divergence."""
        stops = self.control.stop_requested and (self.total_steps is None or self._record.step < self.total_steps)
        return stops or bool(self.diverged)

    # Private

    @property
    def _resumed(self) -> bool:
        """Whether it resumes an earlier run, whose last learning rate, often zero, is that of its first step."""
        return self._record.first_step > 0

    def _collect(self) -> None:
        for step, byte_count in self._memory.take_readings():
            self._record.trace("memory", byte_count, step)
        first_nan, rise = self._record.collect(), self._record.rise
        if (first_nan is not None or rise is not None) and self._check is not None and self._check.has_exploded:
            return  # the weights explain the loss
        if first_nan is not None and not self._divergence_noted and not any("NaN" in note for note in self._notes):
            words = f"The loss is NaN since step {first_nan}: try a lower learning rate, or check the labels."
            self._warn(words, error=True)
        if rise is not None and not self._rise_noted and "loss" in self.headline:
            self._rise_noted = True
            before, (step, value) = rise
            self._warn(f"The loss rose from {before:.3g} to {value:.3g} by step {step}: is the learning rate too high?")

    def _catch_up(self) -> None:
        """Includes what was recorded too soon after the last publication, if that needs no waiting."""
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
        except Exception as error:  # e.g. a full disk, which must not end the training
            self._saved = f"{_NOT_SAVED}: {error}"
        self.publish(force=True)

    def _measure_memory(self) -> None:
        self._warn_once(self._memory.update(self._record.step))

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
        will_save = self.control.save_requested and not self._stopwatch.has_stopped
        saving = "saving after this step" if will_save else self._saved
        return " · ".join([*self._notes, *([saving] if saving else [])])

    def _severe_notes(self, severity: Literal["warning", "error"]) -> tuple[str, ...]:
        """The parts of the message that are warnings, or errors."""
        notes = [note for note in self._notes if self._severe.get(note) == severity]
        if severity == "warning" and self._saved.startswith(_NOT_SAVED):
            notes.append(self._saved)
        if self._mirrored is not None:
            notes += self._mirrored.warnings if severity == "warning" else self._mirrored.errors
        return tuple(dict.fromkeys(notes))

    def _build(self) -> TrainState:
        self._latest = self._own_state() if self._mirrored is None else self._state_of_processes(self._mirrored)
        return self._latest

    def _state_of_processes(self, mirrored: TrainState) -> TrainState:
        return dataclasses.replace(
            mirrored,
            run_id=self.run_id,
            status=self._status_now(),
            elapsed=self._stopwatch.elapsed,
            remaining=None if self._stopwatch.has_stopped else mirrored.remaining,
            message=self._message(),
            warnings=self._severe_notes("warning"),
            errors=self._severe_notes("error"),
            rows=self.rows,
        )

    def _own_state(self) -> TrainState:
        record, elapsed = self._record, self._stopwatch.elapsed
        pace, tokens_per_second = record.pace(elapsed, overall=self._stopwatch.has_stopped)
        remaining = None
        if pace is not None and self.total_steps is not None and not self._stopwatch.has_stopped:
            remaining = max(0.0, (self.total_steps - record.step) * pace)
        return TrainState(
            run_id=self.run_id,
            adapter=self.adapter,
            adapters=self.adapters if len(self.adapters) > 1 else (),
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
            memory=self._memory.state,
            message=self._message(),
            warnings=self._severe_notes("warning"),
            errors=self._severe_notes("error"),
            kept_step=self.kept_step,
            restored_step=self.restored_step,
            first_step=record.first_step,
            gradient_norm=record.gradient_norm,
            series={name: curve.points() for name, curve in list(record.series.items())},
            metrics=dict(record.metrics),
            metric_history={name: curve.points() for name, curve in record.metric_history.items()},
            best_step=record.best[0] if record.best else None,
            samples=(*self._samples, *self._rewarded),
            folder=self.folder,
            kept_id=self.kept_id,
            members=self.members(self._status_now()),
            rows=self.rows,
            headline=self.headline,
        )

    def _warn(self, message: str, *, error: bool = False) -> None:
        if message:
            self.note(message, warning=True, error=error)
            self._warnings.append(message)  # emitted at the next publication, if no front end shows the run

    def _warn_once(self, message: str) -> None:
        if message and not self._display_failed:
            self._display_failed = True
            warnings.warn(message, stacklevel=3)


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    """Refuses metrics that are no numbers, and names of what runs have anyway."""
    for name, value in metrics.items():
        if name == "eval_loss" or name.replace("_", " ") in OF_STEPS:
            way = "run.evaluated(loss=…) records it" if name == "eval_loss" else "every run has a curve of this name"
            raise ConfigError(f"a metric cannot be called {name!r}: {way}", field=name)
        single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
        if not (single or isinstance(value, Real)):
            raise ConfigError(
                f"metric {name!r:.60} must be a number or a tensor with one element, not {with_article(value)}",
                field=name,
            )


def start_run(
    model: nn.Module,
    total_steps: int | None = None,
    *,
    publish: Callable[[TrainState], None] | None = None,
    control: RunControl | None = None,
    **options: Any,
) -> Run:
    """Creates a run for your own training loop; see :class:`Run` for how to feed it.

    Args:
        model: The model in training.
        total_steps: The number of optimizer steps planned, or None if it is unknown.
        publish: Called with each new state.
        control: Receives requests to stop and pause.
        **options: Further arguments of :class:`Run`.
    """
    return Run(model, total_steps, publish=publish, control=control, **options)
