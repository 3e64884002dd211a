"""The parent process of a training in several processes: forwards requests, mirrors states, loads the adapter."""

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
from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.checkpoint import scratch_folder
from nbpeft.checkpoint.staging import Staging, sweep
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import NbpeftError, TrainingError
from nbpeft.memory.formatting import size_text
from nbpeft.runs.folder import RunFolder
from nbpeft.runs.store import RunPlace
from nbpeft.state import TrainState, TrainStatus
from nbpeft.training.adapters.adapted_model import base_of
from nbpeft.training.adapters.method_state import read_method_state
from nbpeft.training.adapters.shards import can_start_on_the_cpu, note_on_whole
from nbpeft.training.launch.job import JOB, ON_THE_CPU, RESULT, Ended
from nbpeft.training.launch.processes import Failure, Launch, Processes
from nbpeft.training.launch.transport import save_whole
from nbpeft.training.monitor.run import Run, StopRun
from nbpeft.training.request import TrainRequest
from nbpeft.training.transformers.trainer_patch import load_adapters

_POLL_INTERVAL = 0.05
"""Seconds between two checks for requests."""
_TO_END = 120.0
"""Seconds that the processes have to end after the adapter was saved."""


def train_in_subprocesses(request: TrainRequest, run: Run, launch: Launch) -> dict[str, float]:
    """Trains a copy of a model in other processes, and loads the trained adapters into the model.

    The adapters do not change until all processes have finished; then all of them change at once.
    An interrupt stops the processes as Stop does. An interrupt before the first step, or a second one, ends them
    immediately and leaves the adapters unchanged: the trained weights are then only in the run's folder.

    Args:
        request: of tokenized rows; the adapters to train are active on its model, whose weights reach the processes in
            a temporary file.
        run: shows how it goes; ``mirrors`` is set.
        launch: how many processes.

    Returns:
        The metrics that the Trainer reports.

    Raises:
        TrainingError: a process failed; the message is that of its error.
    """
    model, place = request.model, request.run_dir
    if manager_of(model) is None:
        raise TrainingError(
            f"only models adapted by nbpeft can be trained in several processes, not a {type(model).__name__}"
        )
    devices = set((getattr(base_of(model), "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise TrainingError(f"the model is spread over {len(devices)} devices: load it with device_map={{'': 0}}")
    with _job_folder(launch, place) as folder:
        size = save_whole(folder / JOB, request, model)
        if request.arguments.get("fsdp"):
            if can_start_on_the_cpu(base_of(model)):
                (folder / ON_THE_CPU).touch()
            run.note(note_on_whole(base_of(model)))
        run.note(f"{launch.world} processes, which read the model from a file of {size_text(size)}")
        try:
            with _held_port() as port, _started(folder, launch, run, port) as processes:
                ended, interrupted = _wait(processes, run)
                with DeferredInterrupts(to_the_end=True):
                    load_adapters(model, folder / RESULT)
                    read_method_state(model, folder / RESULT)
                    run.received_weights(ended.token_count)
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
    """Mirrors states and forwards requests until the end; returns the result and whether it was interrupted."""
    relay, has_trained, interrupted = _Relay(processes, run), False, False
    while True:
        try:
            relay.forward()
            message = processes.receive(_POLL_INTERVAL)
            if isinstance(message, TrainState):
                has_trained = message.step > message.first_step
                relay.forward(waiting=message.status == "paused")
                run.mirror(message)
            elif processes.answer is not None:
                return processes.answer, interrupted
            else:
                _check(processes)
        except KeyboardInterrupt:
            # The first interrupt stops after the current step, so that the weights are kept; a second one ends at once.
            if interrupted or not has_trained:
                processes.end()
                if processes.answer is None:
                    raise
            interrupted = True
            run.control.request_stop()


class _Relay:
    """Forwards requests to a run in other processes."""

    def __init__(self, processes: Processes, run: Run) -> None:
        self._waiting = False
        self._processes, self._control = processes, run.control
        self._sent: dict[str, Any] = {"stop": False, "reason": "", "pause": False}

    def forward(self, waiting: bool | None = None) -> None:
        """Forwards new requests.

        Args:
            waiting: whether the run is paused now; None if that has not been reported since the last call.
        """
        control, self._waiting = self._control, self._waiting if waiting is None else waiting
        control.relay(lambda: self._processes.send(save=True), waiting=self._waiting)
        wanted = {"stop": control.stop_requested, "reason": control.reason, "pause": control.paused}
        if wanted != self._sent:
            self._processes.send(**wanted)
            self._sent = wanted


def _check(processes: Processes) -> None:
    """Raises the error of a failed process, unless the training had been completed before."""
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
        f"sent a message that cannot be read here ({processes.unreadable}): restart Python if a package was upgraded "
        "since it started"
    )


def _note_end(run: Run, place: Any, status: TrainStatus, message: str) -> None:
    """Records in the run's folder how it ended, if its process could not; a folder without any step is removed."""
    if not run.folder or place is None:
        return
    folder, chosen = RunFolder(Path(run.folder)), RunPlace.of(place)
    with contextlib.suppress(NbpeftError):  # the error of the training is the one to report
        facts, record = folder.facts(), folder.record()
        # "failed" may be a consequence of the failure of another process.
        if facts.get("status") not in ("running", "failed"):
            return
        if chosen.name is None and not folder.entries():
            chosen.store.delete(folder.name)
            run.kept_in("", "")
        else:
            last = {"step": record.step, "loss": record.loss, "seconds": record.seconds}
            folder.write({**facts, **last, "status": status, "message": message})


def _note_loss(run: Run, place: Any) -> None:
    """Records that the processes ended before the trained weights were loaded, and where these are saved."""
    run.lost = "the adapters are unchanged"
    _note_end(run, place, "stopped", run.stop_message())
    saved_steps = RunFolder(Path(run.folder)).kept_steps() if run.folder else ()
    if any(saved_steps):
        run.lost += f"; run {Path(run.folder).name} can be resumed from step {saved_steps[0]:,}"
    run.note(run.lost, warning=True)


@contextlib.contextmanager
def _job_folder(launch: Launch, place: Any) -> Iterator[Path]:
    """A folder for all hosts, removed afterwards: a temporary one, or for several hosts one next to the runs."""
    if not launch.hosts:
        with scratch_folder() as folder:
            yield folder
        return
    runs_folder = RunPlace.of(place).store.place if place is not None else Path.cwd()
    runs_folder.mkdir(parents=True, exist_ok=True)
    sweep(runs_folder)
    staging = Staging(runs_folder.resolve(), mode=0o700)
    try:
        yield staging.path
    finally:
        staging.close()


def _host_script(folder: Path, launch: Launch, host: int, address: str, port: int) -> str:
    """Writes the script that starts the processes of another host; returns the command to run there."""
    path = folder / f"host-{host}.sh"
    paths = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    words = [sys.executable, "-m", "nbpeft.training.launch.host", str(folder)]
    words += [str(number) for number in (launch.processes, len(launch.hosts), host)] + [address, str(port)]
    lines = ["#!/bin/sh", f"cd {shlex.quote(os.getcwd())} || exit"]
    lines.append(f"PYTHONPATH={shlex.quote(paths)} exec {shlex.join(words)}")
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return f"{launch.hosts[host]}: sh {shlex.quote(str(path))}"


def _started(folder: Path, launch: Launch, run: Run, port: int) -> Processes:
    """The processes of this host, as a context manager; reports the commands for the other hosts."""
    address = (launch.hosts or ("127.0.0.1",))[0]
    scripts = [_host_script(folder, launch, host, address, port) for host in range(1, len(launch.hosts))]
    if scripts:
        run.note("start the other hosts with: " + ", ".join(scripts))
    run.publish(force=True)
    return Processes(folder, launch, address=address, port=port)


@contextlib.contextmanager
def _held_port() -> Iterator[int]:
    """A free port for the first process, reserved until the block ends.

    A socket that is bound but does not listen keeps the kernel from giving the port to another program. On Linux
    with SO_REUSEADDR, which the TCPStore of torch sets too, the first process can still listen on it.
    """
    with socket.socket() as holder:
        if sys.platform == "linux":
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        port = int(holder.getsockname()[1])
        if sys.platform != "linux":
            holder.close()
        yield port
