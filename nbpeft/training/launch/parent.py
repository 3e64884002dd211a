"""The process that waits while others train: hands requests on, shows how it goes, takes the adapter back."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nbpeft import errors
from nbpeft.checkpoint import scratch_folder
from nbpeft.checkpoint.staging import Staging, sweep
from nbpeft.engine.model_tree import is_quantized, manager_of
from nbpeft.errors import NbpeftError, TrainingError
from nbpeft.interrupts import HeldInterrupts
from nbpeft.memory.formatting import size_text
from nbpeft.runs.folder import RunFolder
from nbpeft.runs.store import RunPlace
from nbpeft.state import TrainState
from nbpeft.training.adapted import base_of
from nbpeft.training.launch.job import JOB, ON_THE_CPU, RESULT, Ended, Job
from nbpeft.training.launch.processes import Failure, Launch, Processes
from nbpeft.training.launch.transport import save_whole
from nbpeft.training.method_state import read_method_state
from nbpeft.training.run import Run, StopRun
from nbpeft.training.trainer_patch import load_adapters

_TURN = 0.05
"""Seconds between two looks at requests."""
_TO_END = 120.0
"""Seconds that processes have to end after the adapter was saved."""


def train_apart(
    model: nn.Module, run: Run, launch: Launch, rows: Any, eval_rows: Any, arguments: Mapping[str, Any]
) -> dict[str, float]:
    """Trains a copy of a model in other processes, and gives the model the adapters that come of it.

    Its adapters are as before until all processes have done their part, and then what was trained, in one change.
    An interruption stops the processes as Stop does; one before the first step, or a second one, ends them at once.

    Args:
        model: with the adapters to train active; its weights reach the processes in a temporary file.
        run: shows how it goes; ``mirrors`` is set.
        launch: how many processes.
        rows: tokenized.
        eval_rows: the same, or None.
        arguments: further ones of ``train``.

    Returns:
        What the Trainer reports.

    Raises:
        TrainingError: a process failed; the message is its error.
    """
    if manager_of(model) is None:
        raise TrainingError(f"several processes train models that nbpeft adapted, and no {type(model).__name__}")
    spread = set((getattr(base_of(model), "hf_device_map", None) or {}).values())
    if len(spread) > 1:
        raise TrainingError(f"the model is spread over {len(spread)} devices: load it on one, device_map={{'': 0}}")
    with _job_folder(launch, arguments.get("run_dir")) as folder:
        size = save_whole(folder / JOB, Job(model, rows, eval_rows, dict(arguments)), model)
        if arguments.get("fsdp") and not is_quantized(base_of(model)):
            (folder / ON_THE_CPU).touch()
        run.note(f"{launch.world} processes, which read the model from a file of {size_text(size)}")
        address, port = (launch.machines or ("127.0.0.1",))[0], _free_port()
        scripts = [_host_script(folder, launch, host, address, port) for host in range(1, len(launch.machines))]
        if scripts:
            run.note("start it on the others: " + ", ".join(scripts))
        run.publish(force=True)
        try:
            with Processes(folder, launch, address=address, port=port) as processes:
                ended, interrupted = _wait(processes, run)
                with HeldInterrupts(to_the_end=True):
                    load_adapters(model, folder / RESULT)
                    read_method_state(model, folder / RESULT)
                    run.token_count = ended.token_count
                processes.wait(_TO_END)
        except NbpeftError as error:
            _note_failure(run, error, arguments.get("run_dir"))
            raise
    if interrupted:
        raise KeyboardInterrupt
    if ended.status == "stopped":
        raise StopRun(run)
    return dict(ended.metrics)


def _wait(processes: Processes, run: Run) -> tuple[Ended, bool]:
    """Shows states and hands requests on until the end; says whether an interruption brought it about."""
    relayed, interrupted = _Relay(processes, run), False
    while True:
        try:
            relayed.turn()
            message = processes.receive(_TURN)
            if isinstance(message, TrainState):
                relayed.turn(waiting=message.status == "paused")
                run.mirror(message)
            elif isinstance(message, Ended):
                return message, interrupted
            elif message is None:
                _check(processes, run)
        except KeyboardInterrupt:
            if interrupted or not run.steps_done:
                raise  # the processes end with the block, and the model is as before
            interrupted = True
            run.control.request_stop()


class _Relay:
    """Hands on what is requested of a run that other processes do."""

    def __init__(self, processes: Processes, run: Run) -> None:
        self._waiting = False
        self._processes, self._control = processes, run.control
        self._sent: dict[str, Any] = {"stop": False, "reason": "", "pause": False}

    def turn(self, waiting: bool | None = None) -> None:
        """Hands on what is new; ``waiting`` says whether the run waits now, where that is known anew."""
        control, self._waiting = self._control, self._waiting if waiting is None else waiting
        control.relay(lambda: self._processes.send(save=True), waiting=self._waiting)
        wanted = {"stop": control.stop_requested, "reason": control.reason, "pause": control.paused}
        if wanted != self._sent:
            self._processes.send(**wanted)
            self._sent = wanted


def _check(processes: Processes, run: Run) -> None:
    """Raises the error of a process that failed."""
    failure = processes.failure()
    if failure is None and not processes.running:
        failure = Failure(0, "", "ended before the training did", 0.0)
    if failure is None:
        return
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, NbpeftError) and failure.rank == 0:
        raise kind(failure.message)
    raise TrainingError(f"process {failure.rank} of {processes.launch.world}: {failure.message}", trace=failure.trace)


def _note_failure(run: Run, error: NbpeftError, place: Any) -> None:
    """Says in the folder of the run why it failed, where its process could not; one without a step goes again."""
    if not run.folder or place is None:
        return
    folder, chosen = RunFolder(Path(run.folder)), RunPlace.of(place)
    facts = folder.facts()
    if facts.get("status") not in ("running", "failed"):  # of a failure elsewhere it has the echo
        return
    with contextlib.suppress(NbpeftError):  # the error of the training is the one to hear of
        if chosen.name is None and not folder.entries():
            chosen.store.delete(folder.name)
            run.folder = ""
        else:
            folder.write({**facts, "status": "failed", "message": error.message})


@contextlib.contextmanager
def _job_folder(launch: Launch, place: Any) -> Iterator[Path]:
    """A folder that all hosts see, removed afterwards: a temporary one, or for several hosts one beside the runs."""
    if not launch.machines:
        with scratch_folder() as folder:
            yield folder
        return
    home = RunPlace.of(place).store.place if place is not None else Path.cwd()
    home.mkdir(parents=True, exist_ok=True)
    sweep(home)
    staging = Staging(home.resolve(), mode=0o700)
    try:
        yield staging.path
    finally:
        staging.close()


def _host_script(folder: Path, launch: Launch, host: int, address: str, port: int) -> str:
    """Writes what starts the processes of another host. Returns the command."""
    path = folder / f"host-{host}.sh"
    paths = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    words = [sys.executable, "-m", "nbpeft.training.launch.host", str(folder)]
    words += [str(number) for number in (launch.processes, len(launch.machines), host)] + [address, str(port)]
    lines = ["#!/bin/sh", f"cd {shlex.quote(os.getcwd())} || exit"]
    lines.append(f"PYTHONPATH={shlex.quote(paths)} exec {shlex.join(words)}")
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return f"{launch.machines[host]}: sh {shlex.quote(str(path))}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
