"""A session and a run without a model: the states are real, nothing is computed. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from inspect import ismethod
from types import SimpleNamespace
from typing import Any

from nbpeft.display.charts import smooth
from nbpeft.errors import BusyError, TrainingInterrupted, UnknownAdapterError
from nbpeft.state import AdapterState, MemoryPart, MemoryState, ModelState, SessionState, TrainState
from nbpeft.training.monitor.control import RunControl

INTERVAL = 0.2


def adapter(name: str = "orders", **changes: Any) -> AdapterState:
    """An adapter's state."""
    plain = AdapterState(
        name=name,
        method="LoRA",
        summary={"r": "16", "α": "32"},
        module_count=210,
        targets=("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
        parameter_count=4_884_480,
        byte_count=19_537_920,
        trainable=True,
        active=False,
        merged=False,
    )
    return dataclasses.replace(plain, **changes)


ADAPTERS = (
    adapter("orders", active=True),
    adapter(
        "pirate",
        method="DoRA",
        summary={"r": "8", "α": "16"},
        module_count=60,
        targets=("q_proj", "v_proj"),
        parameter_count=506_880,
        byte_count=2_027_520,
        trainable=False,
    ),
    adapter(
        "sql",
        summary={"r": "8*", "α": "8"},
        module_count=60,
        targets=("q_proj", "v_proj"),
        parameter_count=460_800,
        byte_count=1_843_200,
        trainable=False,
    ),
)
MEMORY = MemoryState(
    device="cpu",
    parts=(
        MemoryPart("base weights", 269_000_000),
        MemoryPart("adapters", 22_000_000),
        MemoryPart("gradients", 19_000_000),
        MemoryPart("optimizer", 37_000_000, "two moments a parameter"),
        MemoryPart("activations", 104_000_000),
    ),
    device_total=582_000_000,
    device_free=131_000_000,
)


def model(name: str = "model", adapters: Sequence[AdapterState] = ADAPTERS, **changes: Any) -> ModelState:
    """A model's state."""
    plain = ModelState(
        name=name,
        class_name="LlamaForCausalLM",
        dtype="bfloat16",
        device="cpu",
        parameter_count=140_366_688,
        trainable_count=sum(item.parameter_count for item in adapters if item.trainable),
        adapters=tuple(adapters),
        active=tuple(item.name for item in adapters if item.active),
    )
    return dataclasses.replace(plain, **changes)


def train_state(step: int = 25, total: int | None = 40, **changes: Any) -> TrainState:
    """A run's state, its loss falling as it does."""
    history = tuple((number, loss_at(number)) for number in range(1, step + 1))
    plain = TrainState(
        run_id="run",
        adapter="orders",
        status="running",
        step=step,
        total_steps=total,
        epoch=0.625,
        loss=history[-1][1] if history else None,
        smoothed_loss=smooth(history)[-1][1] if history else None,
        eval_loss=0.102 if step >= 20 else None,
        eval_step=20 if step >= 20 else None,
        learning_rate=7.1e-4,
        tokens_per_second=241.3,
        elapsed=51.0,
        remaining=31.0,
        history=history,
        eval_history=tuple((number, loss_at(number) + 0.05) for number in (10, 20) if number <= step),
    )
    return dataclasses.replace(plain, **changes)


def loss_at(step: int) -> float:
    """A loss that falls and jitters."""
    return 2.3 * math.exp(-step / 8) + 0.06 + 0.12 * math.exp(-step / 12) * math.sin(step * 2.1)


class FakeSession:
    """Takes the commands of a panel and publishes states, like ``nbpeft.session.Session``."""

    def __init__(self, *models: ModelState) -> None:
        self.models = {item.name: item for item in models or (model(),)}
        self.commands: list[tuple[Any, ...]] = []
        self.error: BaseException | None = None
        self.deleted: list[tuple[str, ModelState]] = []
        self.busy = ""
        self.measured = 0
        self.revision = 0
        self.started: list[Callable[[FakeRun, str], object]] = []
        self._subscribers: list[Callable[[], Callable[[SessionState], object] | None]] = []

    @property
    def state(self) -> SessionState:
        """The state now."""
        return SessionState(tuple(self.models.values()), next(iter(self.models), None), self.busy, self.revision)

    @property
    def subscriber_count(self) -> int:
        """Subscribers that are still alive."""
        return sum(reference() is not None for reference in self._subscribers)

    def subscribe(self, callback: Callable[[SessionState], object]) -> Callable[[], None]:
        """Bound methods are held weakly."""
        reference: Any = weakref.WeakMethod(callback) if ismethod(callback) else (lambda: callback)
        self._subscribers.append(reference)
        return lambda: self._subscribers.remove(reference) if reference in self._subscribers else None

    def publish(self) -> None:
        """Tells the subscribers."""
        self.revision += 1
        for reference in list(self._subscribers):
            callback = reference()
            if callback is not None:
                callback(self.state)

    def change(self, name: str, **changes: Any) -> None:
        """Changes a model's state and publishes."""
        self.models[name] = dataclasses.replace(self.models[name], **changes)
        self.publish()

    def use(self, names: str | Sequence[str], *, model: str) -> Any:
        chosen = (names,) if isinstance(names, str) else tuple(names)
        self._take("use", *chosen)
        enabled = chosen != ("base",)
        for name in chosen if enabled else ():
            self._require(name, model)
        adapters = [dataclasses.replace(item, active=item.name in chosen) for item in self.models[model].adapters]
        self.change(model, adapters=tuple(adapters), active=chosen if enabled else (), enabled=enabled)
        return SimpleNamespace(notes=())

    def notices(self) -> tuple[str, ...]:
        """There are none."""
        return ()

    def save(self, folder: str, *, adapter: str, model: str, replace: bool) -> str:
        self._take("replace" if replace else "save", adapter, folder)
        self._require(adapter, model)
        return f"saved {adapter!r} to {folder}, 19.5 MB"

    def delete(self, name: str, *, model: str) -> str:
        self._take("delete", name)
        self._require(name, model)
        kept = tuple(item for item in self.models[model].adapters if item.name != name)
        active = tuple(item for item in self.models[model].active if item != name)
        before = self.models[model]
        self.change(model, adapters=kept, active=active)
        self.deleted.append((name, before))
        return f"deleted {name!r}"

    def undo(self, *, model: str) -> str:
        self._take("undo")
        name, before = self.deleted.pop()
        self.change(model, adapters=before.adapters, active=before.active)
        return f"{name!r} is back, as it was before it was deleted"

    def measure(self, model: str) -> MemoryState:
        self.measured += 1
        return MEMORY

    def _take(self, *command: Any) -> None:
        self.commands.append(command)
        if self.busy:
            raise BusyError(f"busy: {self.busy}; try again when it has finished")
        if self.error is not None:
            raise self.error

    def _require(self, name: str, model: str) -> None:
        if name not in [item.name for item in self.models[model].adapters]:
            raise UnknownAdapterError(f"There is no adapter {name!r}.")


class FakeRun:
    """A run that only counts steps, with the control that a real one has."""

    def __init__(self, session: FakeSession, total_steps: int | None = 40, model_name: str = "model") -> None:
        self.control = RunControl()
        self.run_id = f"run{id(self)}"
        self._session = session
        self._model_name = model_name
        self._published_at = float("-inf")
        self._began = time.monotonic()
        self.shown = ""
        self.thread: int | None = None
        self._lock = threading.RLock()
        self._state = train_state(0, total_steps, run_id=self.run_id, remaining=None, elapsed=0.0)

    @property
    def state(self) -> TrainState:
        """The run now."""
        status = self._state.status
        if status == "running":
            paused: Any = "paused" if self.control.waiting else "pausing"
            status = "stopping" if self.control.stop_requested else paused if self.control.paused else status
        return dataclasses.replace(self._state, status=status)

    def tick(self) -> TrainState:
        """The run now, its clock included."""
        now = self.state
        elapsed = now.elapsed if now.status == "paused" else time.monotonic() - self._began
        return dataclasses.replace(now, elapsed=elapsed)

    def __enter__(self) -> FakeRun:
        self.thread = threading.get_ident()
        for callback in self._session.started:
            callback(self, self._model_name)
        self._publish()
        return self

    def step(self) -> bool:
        """Counts a step; whether to stop."""
        number = self._state.step + 1
        made = train_state(number, self._state.total_steps, run_id=self.run_id)
        total = self._state.total_steps
        remaining = (total - number) * 0.05 if total else None
        self._state = dataclasses.replace(made, elapsed=number * 0.05, remaining=remaining)
        if time.monotonic() - self._published_at >= INTERVAL:
            self._publish()
        stop = self.control.wait_or_stop(on_wait=self._publish)
        return stop

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        stopped = self.control.stop_requested or isinstance(error, KeyboardInterrupt)
        status: Any = "stopped" if stopped else "failed" if error is not None else "finished"
        message = f"stopped at step {self._state.step}" if stopped else str(error or "")
        self._state = dataclasses.replace(self._state, status=status, message=message, remaining=None)
        self._publish()
        if isinstance(error, KeyboardInterrupt):
            raise TrainingInterrupted(message) from None

    def _publish(self) -> None:
        self._published_at = time.monotonic()
        if self._model_name in self._session.models:
            self._session.change(self._model_name, training=self.state)
        else:
            self._session.publish()


def simulate(session: FakeSession, steps: int = 40, seconds: float = 0.05, model_name: str = "model") -> FakeRun:
    """Runs a loop that sleeps, until its end or until it is stopped."""
    with FakeRun(session, steps, model_name) as run:
        for _ in range(steps):
            time.sleep(seconds)
            if run.step():
                break
    return run
