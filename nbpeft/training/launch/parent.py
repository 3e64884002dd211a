"""The process that waits while others train: hands requests on, shows how it goes, takes the adapter back."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbpeft import errors
from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.checkpoint import scratch_folder
from nbpeft.checkpoint.staging import Staging, sweep
from nbpeft.engine.tree.model_tree import is_quantized, manager_of
from nbpeft.errors import NbpeftError, TrainingError
from nbpeft.memory.formatting import size_text
from nbpeft.runs.folder import RunFolder
from nbpeft.runs.store import RunPlace
from nbpeft.state import TrainState, TrainStatus
from nbpeft.training.adapters.adapted_model import base_of
from nbpeft.training.adapters.method_state import read_method_state
from nbpeft.training.launch.job import JOB, ON_THE_CPU, RESULT, Ended
from nbpeft.training.launch.processes import Failure, Launch, Processes
from nbpeft.training.launch.transport import save_whole
from nbpeft.training.monitor.run import Run, StopRun
from nbpeft.training.request import TrainRequest
from nbpeft.training.transformers.trainer_patch import load_adapters

_TURN = 0.05
"""Seconds between two looks at requests."""
_TO_END = 120.0
"""Seconds that processes have to end after the adapter was saved."""


def train_in_subprocesses(request: TrainRequest, run: Run, launch: Launch) -> dict[str, float]:
    """Trains a copy of a model in other processes, and gives the model the adapters that come of it.

    Its adapters are as before until all processes have done their part, and then what was trained, in one change.
    An interruption stops the processes as Stop does. One before the first step, or a second one, ends them at once, and
    the adapters stay as they were before: what was learned is then in the run's folder alone.

    Args:
        request: of tokenized rows; the adapters to train are active on its model, whose weights reach the processes in
            a temporary file.
        run: shows how it goes; ``mirrors`` is set.
        launch: how many processes.

    Returns:
        What the Trainer reports.

    Raises:
        TrainingError: a process failed; the message is its error.
    """
    model, place = request.model, request.run_dir
    if manager_of(model) is None:
        raise TrainingError(f"several processes train models that nbpeft adapted, and no {type(model).__name__}")
    spread = set((getattr(base_of(model), "hf_device_map", None) or {}).values())
    if len(spread) > 1:
        raise TrainingError(f"the model is spread over {len(spread)} devices: load it on one, device_map={{'': 0}}")
    with _job_folder(launch, place) as folder:
        size = save_whole(folder / JOB, request, model)
        if request.arguments.get("fsdp") and not is_quantized(base_of(model)):
            (folder / ON_THE_CPU).touch()
        run.note(f"{launch.world} processes, which read the model from a file of {size_text(size)}")
        try:
            with _held_port() as port, _started(folder, launch, run, port) as processes:
                ended, interrupted = _wait(processes, run)
                with HeldInterrupts(to_the_end=True):
                    load_adapters(model, folder / RESULT)
                    read_method_state(model, folder / RESULT)
                    run.brought_back(ended.token_count)
                processes.wait(_TO_END)
        except NbpeftError as error:
            _note_end(run, place, "failed", error.message)
            raise
        except KeyboardInterrupt:
            if not run.steps_done:
                _note_loss(run, place)
            raise
    if interrupted:
        raise KeyboardInterrupt
    if ended.status == "stopped":
        raise StopRun(run)
    return dict(ended.metrics)


def _wait(processes: Processes, run: Run) -> tuple[Ended, bool]:
    """Shows states and hands requests on until the end; says whether an interruption brought it about."""
    relayed, learning, interrupted = _Relay(processes, run), False, False
    while True:
        try:
            relayed.turn()
            message = processes.receive(_TURN)
            if isinstance(message, TrainState):
                learning = message.step > message.first_step
                relayed.turn(waiting=message.status == "paused")
                run.mirror(message)
            elif processes.answer is not None:
                return processes.answer, interrupted
            else:
                _check(processes)
        except KeyboardInterrupt:
            if interrupted or not learning:
                processes.end()
                if processes.answer is None:
                    raise
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


def _check(processes: Processes) -> None:
    """Raises the error of a process that failed, unless all had done their part by then."""
    failure = processes.failure()
    if failure is None and processes.running and not processes.unreadable:
        return
    processes.end()
    if processes.answer is not None:
        return
    if failure is None:
        failure = Failure(0, "", _no_answer(processes), 0.0)
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, NbpeftError) and failure.rank == 0:
        raise kind(failure.message)
    raise TrainingError(f"process {failure.rank} of {processes.launch.world}: {failure.message}", trace=failure.trace)


def _no_answer(processes: Processes) -> str:
    if not processes.unreadable:
        return "ended before the training did"
    return (
        f"sent what cannot be read here ({processes.unreadable}): if a package was upgraded since Python started, "
        "restart it"
    )


def _note_end(run: Run, place: Any, status: TrainStatus, message: str) -> None:
    """Says in the folder of the run how it ended, where its process could not; one without a step is removed."""
    if not run.folder or place is None:
        return
    folder, chosen = RunFolder(Path(run.folder)), RunPlace.of(place)
    with contextlib.suppress(NbpeftError):  # the error of the training is the one to hear of
        facts, record = folder.facts(), folder.record()
        if facts.get("status") not in ("running", "failed"):  # of a failure elsewhere it has the echo
            return
        if chosen.name is None and not folder.entries():
            chosen.store.delete(folder.name)
            run.folder = ""
        else:
            last = {"step": record.step, "loss": record.loss, "seconds": record.seconds}
            folder.write({**facts, **last, "status": status, "message": message})


def _note_loss(run: Run, place: Any) -> None:
    """Says that the processes were ended before what they had learned came back, and where it is kept."""
    run.lost = "the adapters are as before"
    _note_end(run, place, "stopped", run.stop_message())
    kept = RunFolder(Path(run.folder)).kept_steps() if run.folder else ()
    if any(kept):
        run.lost += f"; run {Path(run.folder).name} can be resumed from step {kept[0]:,}"
    run.note(run.lost)


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


def _started(folder: Path, launch: Launch, run: Run, port: int) -> Processes:
    """The processes of this host, to be entered; says how those of the others are started."""
    address = (launch.machines or ("127.0.0.1",))[0]
    scripts = [_host_script(folder, launch, host, address, port) for host in range(1, len(launch.machines))]
    if scripts:
        run.note("start it on the others: " + ", ".join(scripts))
    run.publish(force=True)
    return Processes(folder, launch, address=address, port=port)


@contextlib.contextmanager
def _held_port() -> Iterator[int]:
    """A port on which the first process can listen, and which nobody else is given until the block ends."""
    with socket.socket() as holder:
        if sys.platform == "linux":  # where a socket that does not listen leaves the port to another one
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        port = int(holder.getsockname()[1])
        if sys.platform != "linux":
            holder.close()
        yield port
