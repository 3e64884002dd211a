"""Saves a training to disk while it runs: if its process dies, only some seconds of it are lost.

A checkpoint is the adapter in training with its optimizer, scheduler and random state, never the base. The
first one is written before the first step, the next after ten seconds, and further ones so often that they cost
less than 2 % of the time, but at least once a minute. One that takes more than six seconds is written less often, so
that they cost less than 10 % of the time. Stop, an interrupt and a failure write a last one, unless they
occur while the optimizer changes the weights: then the previous checkpoint is the last, and a note names its step.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft._util.out_of_memory import is_out_of_memory
from nbpeft.checkpoint import prompt_format
from nbpeft.confidential import without_secrets
from nbpeft.engine.changes.random_numbers import drawing_from, random_state
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import CheckpointError, TrainingError, cut, in_one_line
from nbpeft.model.saving import files
from nbpeft.names import BOOKKEEPING_FIELDS
from nbpeft.runs.folder import RunFolder
from nbpeft.runs.record import BASE, METHOD, ROWS
from nbpeft.runs.store import RunPlace
from nbpeft.state import ENDED, TrainState, TrainStatus
from nbpeft.training.adapters.adapted_model import base_of, trained_names
from nbpeft.training.adapters.method_state import method_state, save_in_training, set_method_state
from nbpeft.training.data.split import content_of
from nbpeft.training.disk.agreement import broadcast_from_rank0, is_distributed, is_main_process, save_collectively
from nbpeft.training.disk.checkpoints import drop_after, put_checkpoint
from nbpeft.training.disk.kept_arguments import to_keep
from nbpeft.training.disk.sharded_trainer import base_mark
from nbpeft.training.monitor.run import Run

SHARE = 0.015
"""The share of the time spent on writing checkpoints, unless they are written every minute.

Recording a step takes less than 0.5 ms in addition."""
SHORTEST = 10.0
"""The shortest time between two checkpoints, in seconds."""
LONGEST, GREATEST_SHARE = 60.0, 0.1
"""The longest time between two checkpoints in seconds, unless their share of the time would be greater than this."""
_MOST_STATES = 2
_WAY_ON = "pass those of the run ({prefix}data=…), or train a new run with these"
_LONGEST_SYSTEM = 200
"""Most characters of a system prompt among the settings."""
_SHOWN_FIELDS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "optim",
    "seed",
)
"""Fields of ``TrainingArguments`` that are recorded as settings of every run, whether they were given or not."""
_MAIN_FIELDS = ("peft_type", "r", "lora_alpha", "target_modules")


class RunCheckpointer(TrainerCallback):
    """Writes one run's folder while a Trainer trains; the block of the run runs inside ``with checkpointer:``.

    If the folder cannot be written, the run gets one note about it, and the training continues without checkpoints.

    Args:
        place: the folder, and the run to resume, if there is one.
        run: the run, which receives notes and the path of the folder.
        model: the model in training.
        given: the arguments as given, with which the run can be started again.
        data: the fingerprint of the rows, see ``mark_of_rows``.
        clock: returns monotonic time in seconds.

    Attributes:
        folder: the folder of the run; None before the first step, and if nothing can be written.
        trainer: the Trainer; must be set before it trains.
        write_more: writes additional files into the folder of a checkpoint; None for none.
    """

    write_more: Callable[[Path], None] | None = None

    def __init__(
        self,
        place: RunPlace,
        run: Run,
        model: Any,
        given: Mapping[str, Any],
        data: Mapping[str, Any],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trainer: Any = None
        self.folder: RunFolder | None = None
        self._unkept: RunFolder | None = None
        self._place, self._run, self._model, self._data = place, run, model, data
        self._given = place.arguments or given
        self._clock = clock
        self._facts: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._contents: dict[str, str] = {}
        self._saved_step = -1
        self._seconds_before = 0.0
        self._evaluated = False
        self._in_step = self._step_open = False
        self._random: dict[str, Any] = {}
        self._method: dict[str, Tensor] | None = None
        self._next = float("inf")

    # What the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Creates or opens the folder; a resumed run is truncated to the step from which it is resumed."""
        name, store = self._place.name, self._place.store
        if name is not None:
            _check_steps_left(name, store.find(name).facts().get("total_steps"), state)
            self._saved_step = state.global_step
        if not is_main_process():
            return
        with self._noting():
            folder = store.create(self._run.label) if name is None else store.find(name)
            if name is not None:
                folder.open()
            self.folder = folder
            if name is not None:
                self._before, self._contents = folder.facts(), folder.contents()
                self._run.restore_curves(folder.series(state.global_step), folder.samples(state.global_step))
                state.log_history = folder.cut_after(state.global_step)
                self._seconds_before = max((float(entry.get("seconds", 0)) for entry in state.log_history), default=0.0)
                for field in ("saved", "saved_files"):  # steps from here on are not in the saved adapter
                    self._before.pop(field, None)
                self._facts["resumed"] = [*(self._before.get("resumed") or ()), state.global_step]
            process = {"process": os.getpid(), "host": platform.node()}
            self._facts = self._first_facts(args) | self._before | self._renewed(args) | self._facts | process
            self._run.kept_in(str(folder.path), str(self._facts["id"] or ""))
            self._write_facts()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Writes a checkpoint before the first step."""
        if broadcast_from_rank0(self.folder is not None and self._saved_step < 0):
            self._save()
        elif self._next == float("inf"):
            self._next = self._clock() + SHORTEST

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Marks that random numbers are drawn for an unfinished step from here on."""
        self._step_open = True

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Marks that the weights belong to no step from here on, until the step has ended."""
        self._in_step = True

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stores the random state that belongs to the step."""
        self._in_step = self._step_open = False
        self._random, self._method = random_state(), method_state(self._model)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes what was logged."""
        if self.folder is not None and state.log_history:
            entry = state.log_history[-1]
            self._evaluated = self._evaluated or "eval_loss" in entry
            with self._noting():
                self.folder.append({**entry, "seconds": self._seconds()})

    def after_step(self) -> None:
        """Writes a checkpoint if it is due; called after a step was logged and after an epoch was evaluated."""
        if self._step_open or self._run.diverged:  # stopped inside a step: its checkpoint is written at the end
            return
        if self._evaluated:  # an evaluation draws random numbers
            self._random, self._method = random_state(), method_state(self._model)
        saved = self._saved_step == self.trainer.state.global_step
        due = self._evaluated if saved else self._clock() >= self._next
        if broadcast_from_rank0(due and self.folder is not None):
            self._save()

    # Around the run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        folder, state = self.folder, self._run.state
        failed_alone = state.status == "failed" and is_distributed()  # the other processes may be at any point
        try:
            if folder is not None if failed_alone else broadcast_from_rank0(folder is not None):
                with (
                    DeferredInterrupts(to_the_end=True),
                    self._noting(),
                ):  # a second interrupt waits for the last checkpoint
                    if folder is not None and not self._run.learned and state.status == "failed":
                        self._undo(folder)
                        return
                    if folder is not None:
                        for note in self._place.store.tidy():
                            self._run.note(note)
                    if state.status == "finished":
                        self._save(whole=False)
                    elif not failed_alone and self._has_new_state(state.step):
                        self._save_as_the_step_ended()
                    else:
                        self._drop_diverged()
                        self._note_lost_steps()
                        self._write_facts()
        finally:
            with DeferredInterrupts(to_the_end=True):
                self._end()
            if folder is not None:
                folder.close()

    def _end(self) -> None:
        """Records the end of a run whose checkpoints could no longer be written."""
        folder, self._unkept = self._unkept, None
        if folder is not None:
            folder.end(self._facts | _summary(self._run.state) | {"seconds": self._seconds()})
            folder.close()

    def keep_last(self) -> None:
        """Writes a checkpoint of the last step of a run that ends early, unless there is one."""
        if broadcast_from_rank0(self.folder is not None) and self._has_new_state(self._run.state.step):
            with DeferredInterrupts(to_the_end=True), self._noting():
                self._save_as_the_step_ended()

    def mark_saved(self, folder: str) -> None:
        """Records in the run's folder that its adapters were saved in a folder of the user's."""
        if self._run.kept_id and is_main_process():
            for name in trained_names(self._model):
                place = Path(folder, name)
                place = place if os.path.isdir(place) else Path(folder)
                self._place.store.mark_saved(self._run.kept_id, name, place)

    def _drop_diverged(self) -> None:
        """Removes checkpoints after the last good weights of a diverged run, if an earlier one remains."""
        last_good = self._run.state.kept_step
        if self.folder is not None and last_good is not None:
            drop_after(self.folder.path, last_good)

    def _note_lost_steps(self) -> None:
        """Notes the step of the last checkpoint, if later steps were made of which none can be written."""
        step = self._run.state.step
        if self.folder is not None and self._in_step and not self._run.diverged and step > self._saved_step >= 0:
            self._run.note(
                f"the training ended while step {step + 1} changed the weights: the last checkpoint is that of step "
                f"{self._saved_step}",
                warning=True,
            )

    def _save_as_the_step_ended(self) -> None:
        set_method_state(self._model, self._method)
        with drawing_from(self._random or random_state()):
            self._save()

    def _has_new_state(self, step: int) -> bool:
        known = not self._in_step and not self._run.diverged and self.trainer.optimizer is not None
        return known and step > self._saved_step

    def _undo(self, folder: RunFolder) -> None:
        """Restores the disk after a run that failed before its first step."""
        if self._place.name is None:
            folder.close()
            self._place.store.delete(folder.name)
            self._run.kept_in("", "")
        else:
            folder.close()
            folder.restore(self._contents)

    # Writing

    def _save(self, *, whole: bool = True) -> None:
        """Writes a checkpoint now.

        With several processes all of them must call it, and each writes its part.

        Args:
            whole: whether to write the optimizer etc. too; of a finished run only the adapter is written.
        """
        begun, step = self._clock(), int(self.trainer.state.global_step)

        def put(write: Callable[[Path], object]) -> None:
            assert self.folder is not None
            self._write_facts("running")  # first: a process that ends in between leaves no checkpoint without curves
            put_checkpoint(self.folder.path, step, write, most=_MOST_STATES if whole else 1)

        with self._noting():
            save_collectively(put, self._write_state if whole else functools.partial(self._write_adapter, files.save))
            if self._run.state.status in ENDED:
                self._write_facts()
        self._saved_step, self._evaluated = step, False
        now = self._clock()
        self._next = now + _pause_after(now - begun)

    def _write_adapter(self, save: Callable[..., object], folder: Path) -> None:
        names, write = trained_names(self._model), is_main_process()
        options = {"names": names, "embeddings": False, "mark_saved": False, "write": write}
        save(manager_of(self._model), folder, **options, base=base_mark(self.trainer))
        if write:
            self._write_trainer_state(folder)

    def _write_state(self, folder: Path) -> None:
        self._write_adapter(save_in_training, folder)
        trainer = self.trainer
        trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_scaler(str(folder))
        trainer._save_rng_state(str(folder))
        if self.write_more is not None and is_main_process():
            self.write_more(folder)

    def _write_trainer_state(self, folder: Path) -> None:
        """Writes the Trainer's state without its log, which is in the run's curves: the file would grow each step."""
        trainer = self.trainer
        state = dataclasses.replace(trainer.state, log_history=[])
        state.stateful_callbacks = dict(state.stateful_callbacks)
        for callback in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()
        state.save_to_json(str(folder / "trainer_state.json"))

    def _first_facts(self, args: TrainingArguments) -> dict[str, Any]:
        given, left_out = without_secrets(self._given)
        plain, objects = to_keep(given)
        given_settings = {name: value for name, value in plain.items() if name != "members"} | self._swept_settings()
        fields = {name: getattr(args, name) for name in _SHOWN_FIELDS if hasattr(args, name)}
        return {
            "id": uuid.uuid4().hex,
            "model": self._place.model,
            "started": time.time(),
            "settings": self._adapter_settings() | fields | given_settings | self._own_settings(),
            "arguments": plain,
            "secrets": list(left_out),
            "objects": objects,
            "source": dict(self._place.source),
            "origin": self._place.origin,
            "data": dict(self._data),
        }

    def _renewed(self, args: TrainingArguments) -> dict[str, Any]:
        """The arguments and settings of a resumed run, with those that were given again or added."""
        if not self._before:
            return {}
        now = self._first_facts(args)
        return {name: {**self._before.get(name, {}), **now[name]} for name in ("arguments", "settings")}

    def _seconds(self) -> float:
        """Seconds spent on the run, without pauses, including those before it was resumed."""
        return round(self._seconds_before + self._run.elapsed, 3)

    def _own_settings(self) -> dict[str, Any]:
        config = self._model.peft_config[trained_names(self._model)[0]]
        form = prompt_format(config)
        own = {
            BASE: name_of_base(self._model),
            METHOD: method_of(config).title(config),
            ROWS: self._data.get("rows"),
            "starts from": self._run.starts_from,
            "system prompt": cut(form.system, _LONGEST_SYSTEM) if form is not None and form.system else None,
        }
        return {name: value for name, value in own.items() if value}

    def _swept_settings(self) -> dict[str, list[str]]:
        """The settings in which the adapters of a sweep differ, with all their values."""
        settings = [member.settings for member in self._run.members("running")]
        return {
            name: list(dict.fromkeys(member_settings[name] for member_settings in settings))
            for name in (settings[0] if settings else ())
        }

    def _adapter_settings(self) -> dict[str, Any]:
        """The settings of the adapter; of several with different ones, all values."""
        first, *others = [self._settings_of(name) for name in trained_names(self._model)]
        return {
            field: value
            if all(other.get(field) == value for other in others)
            else list(dict.fromkeys(str(one.get(field)) for one in (first, *others)))
            for field, value in first.items()
        }

    def _settings_of(self, name: str) -> dict[str, Any]:
        config = self._model.peft_config[name]
        configured = getattr(config, "target_modules", None)
        targets = (
            [path.rpartition(".")[2] for path in configured]
            if isinstance(configured, list | set | tuple)
            else configured
        )
        defaults = {item.name: item.default for item in dataclasses.fields(config)}
        fields = config.to_dict() | ({"target_modules": sorted(set(targets))} if isinstance(targets, list) else {})
        return {
            name: value
            for name, value in fields.items()
            if name in _MAIN_FIELDS or (value and value != defaults.get(name) and name not in BOOKKEEPING_FIELDS)
        }

    def _write_facts(self, status: TrainStatus | None = None) -> None:
        """Writes everything but checkpoints.

        Args:
            status: the status of the run; by default the current one.
        """
        if self.folder is None:  # another process writes them, or nothing can be written
            return
        state = self._run.state
        state = state if status is None else dataclasses.replace(state, status=status)
        self._facts |= _summary(state) | {"seconds": self._seconds()}
        series = {name: points for name, points in {**state.series, **state.metric_history}.items() if points}
        self.folder.write(self._facts, series, [dataclasses.asdict(sample) for sample in state.samples])

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """A block in which an error of writing, or too little memory for it, ends the checkpoints, not the training."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, CheckpointError | OSError) and not is_out_of_memory(error):
                raise
            folder, self.folder = self.folder, None
            since = "" if folder is None else " from now on"
            if folder is not None:
                with suppress(OSError):  # the folder is empty if not even its settings could be written
                    folder.path.rmdir()
                if os.path.isdir(folder.path):
                    self._unkept = folder
                else:
                    folder.close()
                    self._run.kept_in("", "")
            self._run.note(f"this run is not saved on disk{since}: {in_one_line(error)}", warning=True)


def _pause_after(seconds: float) -> float:
    """Seconds until the next checkpoint, after one that took some to write."""
    return max(SHORTEST, min(seconds / SHARE, max(LONGEST, seconds / GREATEST_SHARE)))


def mark_of_rows(rows: Any, eval_rows: Any = None) -> dict[str, Any]:
    """The fingerprint by which a resumed run recognizes its rows: their number, and a digest of all.

    Args:
        rows: the training rows; adapter -> its own, if each has some.
        eval_rows: the evaluation rows in the same form, or None.
    """
    mark: dict[str, Any] = {}
    for prefix, part in (("", rows), ("eval_", eval_rows)):
        if isinstance(part, Mapping):  # adapter -> its rows
            marks = {name: mark_of_rows(own) for name, own in part.items()}
            mark |= {f"{prefix}rows": sum(own.get("rows", 0) for own in marks.values())}
            mark |= {f"{prefix}digest": _digest(sorted(marks.items())), f"{prefix}adapters": list(marks)}
        elif hasattr(part, "__len__") and hasattr(part, "__getitem__"):
            every = (_comparable(row) for _, row in zip(range(len(part)), part, strict=False))
            mark |= {f"{prefix}rows": len(part), f"{prefix}digest": _digest(every)}
    return mark


def _check_steps_left(name: str, planned: object, state: TrainerState) -> None:
    """Refuses to end a run by resuming it with fewer steps than it has: its state would be lost.

    A run whose process ended after its last planned step is finished without a further one.

    Args:
        name: the run.
        planned: its number of steps so far.
        state: the state of the Trainer that resumes it.

    Raises:
        TrainingError: no step is left.
    """
    if 0 < state.max_steps <= state.global_step and state.max_steps != planned:
        raise TrainingError(
            f"run {name} is at step {state.global_step:,} and would end at step {state.max_steps:,}: give a greater "
            f"max_steps, or more num_train_epochs{f'; it was planned with {planned:,} steps' if planned else ''}"
        )


def _digest(values: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value, sort_keys=True, default=repr).encode() + b"\n")
    return found.hexdigest()[:16]


def check_rows_are_those(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to resume a run with other rows.

    Args:
        name: the run.
        then: the fingerprint of its rows.
        now: the fingerprint of the rows given now.

    Raises:
        TrainingError: the rows differ.
    """
    for prefix, what in (("", "rows"), ("eval_", "evaluation rows")):
        count, present = then.get(f"{prefix}rows"), now.get(f"{prefix}rows")
        if count != present:
            raise TrainingError(
                f"run {name} was trained with {count or 'no'} {what}, but {present or 'none'} are given: "
                f"{_WAY_ON.format(prefix=prefix)}"
            )
        if then.get(f"{prefix}digest") != now.get(f"{prefix}digest"):
            raise TrainingError(f"run {name} was trained with other {what}: {_WAY_ON.format(prefix=prefix)}")


def _summary(state: TrainState) -> dict[str, Any]:
    """The state of a run, for ``run.json``."""
    best = min(state.eval_history, key=lambda point: point[1], default=(None, None))
    status = state.status if state.status in ("finished", "stopped", "failed") else "running"
    return {
        "adapter": state.adapter,
        "adapters": list(state.names),
        "status": status,
        "step": state.step,
        "total_steps": state.total_steps,
        "first_step": state.first_step,
        "loss": state.loss,
        "eval_loss": state.eval_loss,
        "best_loss": best[1],
        "best_step": best[0] if state.best_step is None else state.best_step,
        "metrics": dict(state.metrics),
        "headline": dict.fromkeys(state.headline) | state.figures,
        "updated": time.time(),
        "message": state.message,
    }


def _comparable(row: Any) -> Any:
    if isinstance(row, Mapping):
        return {str(name): _comparable(value) for name, value in row.items()}
    nested = isinstance(row, list | tuple) and isinstance(next(iter(row), None), list | tuple)
    if nested or getattr(row, "ndim", 0) > 1:  # many numbers, such as a picture
        return hashlib.sha256(content_of(row)).hexdigest()
    return row.tolist() if isinstance(row, Tensor | np.ndarray) else row


def name_of_base(model: Any) -> str:
    """The Hub id of the base model, or its folder; its class if neither is known."""
    base: Any = base_of(model)
    return str(getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__)
