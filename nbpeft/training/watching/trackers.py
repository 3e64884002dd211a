"""Logs the metrics of a run to TensorBoard, Weights & Biases or Trackio, offline without an account."""

from __future__ import annotations

import contextlib
import importlib
import io
import netrc
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainingArguments
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from nbpeft._util.interrupts import in_main_thread
from nbpeft._util.paths import from_here
from nbpeft.checkpoint import inside
from nbpeft.confidential import without_secrets
from nbpeft.errors import ConfigError, did_you_mean, in_one_line
from nbpeft.training.disk.kept_arguments import is_plain_value
from nbpeft.training.monitor.run import Run

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "nbpeft"


class Tracker(Protocol):
    """A destination of metrics.

    Attributes:
        place: where the metrics are, and the command that shows them.
    """

    place: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes the metrics of one step."""

    def close(self) -> None:
        """Ends the tracker's run."""


def tracker_names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of the requested trackers, checked.

    Raises:
        ConfigError: a tracker is unknown or not installed; the message says how to install it.
    """
    names = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(str(name), TRACKERS) or f" It is one of: {', '.join(TRACKERS)}"
            raise ConfigError(f"track={name!r:.60} is unknown.{hint}", field="track")
        _require_installed(name, "track")
    return names


def check_report_to(given: Any) -> None:
    """Refuses integrations in ``report_to`` whose package is not installed, for which a Trainer fails less clearly.

    Raises:
        ConfigError: a package is not installed.
    """
    for name in [given] if isinstance(given, str) else given if isinstance(given, list | tuple) else []:
        if name in TRACKERS:
            _require_installed(name, "report_to")


def _require_installed(name: str, field: str) -> None:
    """Refuses a tracker whose package is not installed."""
    if find_spec(name) is None and not (name == "tensorboard" and find_spec("tensorboardX") is not None):
        raise ConfigError(f"{field}={name!r} needs a package that is not installed: pip install {name}", field=field)


class TrackCallback(TrainerCallback):
    """Passes a Trainer's logs on to trackers, which are opened before the first step; ``with callback:`` closes them.

    Args:
        names: the names of the trackers.
        run: the run; trackers write their files into its folder, if it has one.
        settings: the settings of the training, which are logged without secrets.
    """

    def __init__(self, names: Sequence[str], run: Run, settings: Mapping[str, Any]) -> None:
        self._names, self._run = names, run
        self._settings = {name: value for name, value in without_secrets(settings)[0].items() if is_plain_value(value)}
        self._open: dict[str, Tracker] = {}
        self._closing = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the trackers, in the main process only.

        Raises:
            CheckpointError: the folder of the run, which may come from anyone, has a link that leads out of it.
        """
        if not state.is_world_process_zero:
            return
        run = self._run
        folder = Path(run.folder or f"{PROJECT}_tracked/{run.adapter.replace(', ', '+')}-{run.run_id}")
        for name in self._names:
            folder.mkdir(parents=True, exist_ok=True)
            inside.check_stays(folder, name)
            with _quiet():
                tracker = _OPENED[name](folder.name, folder, self._settings)
            run.note(tracker.place)
            self._open[name] = tracker
            self._closing.callback(self._close, name, tracker)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the metrics, named ``train/loss``, ``eval/loss`` etc."""
        renamed: dict[str, Any] = rewrite_logs(logs or {})
        numbers = {name: value for name, value in renamed.items() if isinstance(value, int | float)}
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(numbers, state.global_step)
            except Exception as error:  # a network that fails must not end a training
                del self._open[name]
                self._note(name, error)

    def _close(self, name: str, tracker: Tracker) -> None:
        try:
            with _quiet():
                tracker.close()
        except Exception as error:  # a failing tracker must not cost the result of the training
            self._note(name, error)

    def _note(self, name: str, error: Exception) -> None:
        self._run.note(f"{name} failed and receives no more metrics: {in_one_line(error):.200}", warning=True)

    def __enter__(self) -> TrackCallback:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()
        self._closing.close()


class _TensorBoard:
    def __init__(self, run_name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        home = "torch.utils.tensorboard" if find_spec("tensorboard") is not None else "tensorboardX"
        chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
        place = Path(chosen, run_name) if chosen else folder / "tensorboard"
        self.place = f"TensorBoard: tensorboard --logdir {_typed(place)}"
        self._writer: Any = importlib.import_module(home).SummaryWriter(str(place))
        self._writer.add_text("settings", "\n".join(f"    {name} = {value}" for name, value in settings.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        self._run = wandb.init(
            project=project,
            name=run_name,
            dir=str(folder),
            mode=mode,
            config=dict(settings),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        link = getattr(self._run, "url", None)
        files = Path(str(getattr(self._run, "dir", folder))).parent
        self.place = f"Weights & Biases: {link}" if link else f"Weights & Biases, offline: wandb sync {_typed(files)}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "train/global_step": step})

    def close(self) -> None:
        self._run.finish()


def _has_wandb_key() -> bool:
    """Whether an account is set up; without one wandb would prompt for it and block the cell."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "api.wandb.ai").rpartition("/")[2]
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


class _Trackio:
    def __init__(self, run_name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self._run = self._trackio.init(
            project=project, name=run_name, config=dict(settings), resume="allow", embed=False
        )
        self.place = f"Trackio: trackio show --project {shlex.quote(project)}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


_OPENED: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def _typed(place: Path) -> str:
    """A path as it is typed in a shell, relative to the working directory if it is inside."""
    return shlex.quote(str(from_here(place)))


def _quiet() -> AbstractContextManager[object]:
    """A block without the output of a tracker.

    In another thread the output is not redirected: ``redirect_stdout`` replaces the stream of all threads, and would
    swallow what other cells print meanwhile.
    """
    return contextlib.redirect_stdout(io.StringIO()) if in_main_thread() else nullcontext()
