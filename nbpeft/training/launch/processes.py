"""The processes of one training on this host, which start and end together."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.errors import ConfigError, in_one_line
from nbpeft.training.disk.agreement import is_launched
from nbpeft.training.launch.job import Ended

CHILD = "nbpeft.training.process"
"""The module that each process runs."""
MOST = 256
_GRACE = 5.0
"""Seconds that a process has to end after SIGTERM."""


@dataclass(frozen=True)
class Launch:
    """The number of processes and the hosts of a training.

    Attributes:
        processes: number of processes on each host.
        hosts: addresses of the hosts, this one's first; empty if there is only this one.
    """

    processes: int
    hosts: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        """The number of processes on all hosts, torch's world size."""
        return self.processes * max(len(self.hosts), 1)


def launch_of(processes: Any, hosts: Any = None, *, sharded: bool = False) -> Launch | None:
    """How to launch a training; None if it runs in this process.

    A process that was itself started by a launcher launches no others.

    Args:
        processes: number of processes on each host, as given; None for one.
        hosts: addresses of the hosts, as given, or None.
        sharded: whether the model is sharded over the processes.

    Raises:
        ConfigError: an argument is invalid, or this machine has too few devices.
    """
    count = 1 if processes is None else processes
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST:
        raise ConfigError(
            f"processes must be a whole number from 1 to {MOST}, not {processes!r:.60}", field="processes"
        )
    names = (hosts,) if isinstance(hosts, str) else tuple(hosts or ())
    if not all(isinstance(name, str) and name for name in names) or len(names) == 1:
        raise ConfigError(
            f"hosts must be at least two addresses, this machine's first, not {hosts!r:.80}", field="hosts"
        )
    if is_launched() or (count == 1 and not names):
        if sharded and not is_launched():
            raise ConfigError(
                "fsdp shards a model over several processes: set their number with processes=…", field="fsdp"
            )
        return None
    cards = torch.accelerator.device_count() if torch.accelerator.is_available() else count
    if count > cards:
        raise ConfigError(
            f"{count} processes need {count} {torch.accelerator.current_accelerator()} devices, and this machine has "
            f"{cards}: set processes={cards}",
            field="processes",
        )
    return Launch(count, names)


def environment(launch: Launch, host: int, local_rank: int, address: str, port: int) -> dict[str, str]:
    """The environment of one process: the variables that ``torch.distributed.run`` sets, and this interpreter's paths.

    Args:
        launch: the number of processes and hosts.
        host: index of the host, from 0.
        local_rank: index of the process on its host.
        address: address of the first host.
        port: port on the first host.
    """
    threads = max(1, (os.cpu_count() or 1) // launch.processes)
    ranks = {
        "RANK": host * launch.processes + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": launch.world,
        "LOCAL_WORLD_SIZE": launch.processes,
        "GROUP_RANK": host,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": paths, **{k: str(v) for k, v in ranks.items()}}


class Processes:
    """The processes of this host; a context manager at whose end they have ended.

    The first process sends messages (``receive``) and takes requests (``send``). If this process dies, the others end
    by themselves within seconds.

    Args:
        folder: the folder of the job, into which their output and errors are written.
        launch: the number of processes and hosts.
        host: index of this host, from 0.
        address: address of the first host.
        port: port on the first host.

    Attributes:
        answer: the end of the training; None until the first process reports it.
        unreadable: why a message of the first process could not be read; empty if all could.
    """

    answer: Ended | None = None
    unreadable = ""

    def __init__(self, folder: Path, launch: Launch, *, host: int = 0, address: str, port: int) -> None:
        self.folder, self.launch = folder, launch
        self._first = host * launch.processes
        self._variables = [environment(launch, host, rank, address, port) for rank in range(launch.processes)]
        self._running: list[subprocess.Popen[bytes]] = []
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="nbpeft-processes", daemon=True)

    def __enter__(self) -> Self:
        try:
            for number, variables in enumerate(self._variables):
                self._running.append(self._start(number, variables))
            self._reader.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with DeferredInterrupts(to_the_end=True):
            self.end()

    def _start(self, number: int, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        # In a session of its own, so that SIGINT to the notebook's process group reaches only the notebook.
        with open(self.folder / f"process-{self._first + number}.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", CHILD, str(self.folder)],
                env=dict(variables),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if number == 0 else log,
                stderr=log,
                start_new_session=True,
            )

    def _read(self) -> None:
        stream = self._running[0].stdout
        assert stream is not None
        try:
            while True:
                message = pickle.load(stream)
                if isinstance(message, Ended):
                    self.answer = message
                else:
                    self._messages.put(message)
        except EOFError:
            return
        except Exception as error:  # e.g. a class that differs in the other process
            self.unreadable = f"{type(error).__name__}: {in_one_line(error)}"

    def receive(self, timeout: float) -> Any:
        """The next message of the first process other than its answer; None if none arrives in ``timeout`` seconds."""
        try:
            return self._messages.get(timeout=timeout)
        except queue.Empty:
            return None

    def send(self, **request: Any) -> None:
        """Sends a request to the first process."""
        stream = self._running[0].stdin
        assert stream is not None
        with contextlib.suppress(OSError, ValueError):  # the process has ended, which the parent detects by itself
            pickle.dump(request, stream)
            stream.flush()

    @property
    def running(self) -> bool:
        """Whether any of the processes is running."""
        return any(process.poll() is None for process in self._running)

    def failure(self) -> Failure | None:
        """The failure that caused the others, on any host; None if no process failed.

        A process that was killed reports nothing, and the others report that their connection to it was lost. So it
        comes before the first report; but a process that aborts may do so because it lost a connection.
        """
        if not self._failed() and not Failure.all_in(self.folder):
            return None
        time.sleep(0.2)  # the process that failed first may still be writing its report
        reports, failed = Failure.all_in(self.folder), self._failed()
        killed = {number: code for number, code in failed.items() if code < 0 and code != -signal.SIGABRT}
        if reports and not killed:
            return min(reports, key=lambda found: found.time)
        number, code = next(iter((killed or failed).items()))
        how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        rank = self._first + number
        log = self.folder / f"process-{rank}.log"
        why = " (out of memory?)" if code == -signal.SIGKILL else _last_line(log)
        return Failure(rank, "", how + why, time.time())

    def _failed(self) -> dict[int, int]:
        """The exit statuses of this host's processes that have failed, by their numbers."""
        return {number: code for number, process in enumerate(self._running) if (code := process.poll())}

    def end(self, grace: float = _GRACE) -> None:
        """Ends the running processes: with SIGTERM, and after ``grace`` seconds with SIGKILL.

        Afterwards all messages that they sent have been read.
        """
        alive = [process for process in self._running if process.poll() is None]
        for process in alive:
            with contextlib.suppress(OSError):
                process.terminate()
        until = time.monotonic() + grace
        for process in self._running:
            try:
                process.wait(max(until - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._reader.ident is not None:
            self._reader.join(grace)
        for process in self._running:
            # A grandchild may have inherited the pipe and keep it open; closing a stream that the reader thread is
            # still blocked on would block too.
            for stream in (process.stdin, None if self._reader.is_alive() else process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def wait(self, timeout: float) -> bool:
        """Waits at most ``timeout`` seconds for the end of all processes; returns whether all have ended."""
        until = time.monotonic() + timeout
        while self.running and time.monotonic() < until:
            time.sleep(0.02)
        return not self.running


@dataclass(frozen=True)
class Failure:
    """The failure of a process.

    Attributes:
        rank: rank of the process.
        kind: name of the error's class.
        message: the error in one line.
        time: time of the failure, in seconds since 1970.
        trace: the traceback as text.
    """

    rank: int
    kind: str
    message: str
    time: float
    trace: str = ""

    def write(self, folder: Path) -> None:
        """Writes the failure into the folder of a job, for the parent process."""
        path = folder / f"failure-{self.rank}.json"
        path.with_suffix(".new").write_text(json.dumps(vars(self)), encoding="utf-8")
        os.replace(path.with_suffix(".new"), path)

    @classmethod
    def all_in(cls, folder: Path) -> list[Failure]:
        """The failures that the processes of a job have written."""
        failures = []
        for path in folder.glob("failure-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                failures.append(cls(**json.loads(path.read_text(encoding="utf-8"))))
        return failures


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return f": {lines[-1].strip()[:200]}" if lines else ""
