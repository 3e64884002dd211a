"""Kills a write, in a process forked for it, at a moment or after a system call; and lets calls fail.

A fork of a process that has everything imported costs a hundredth of a new one.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.effort import drawn as effort_drawn
from tests.effort import effort

KILLS = effort(quick=3, full=10, long=200)
"""Deaths of each writer at random moments."""
CHILD_SECONDS = 120
"""How long a forked process may take."""

DURABLE = ("mkdir", "replace", "rename", "link", "fsync", "unlink", "rmdir")
"""Calls of ``os`` that change what is on the disk; a death is most interesting after one of them."""
PATHS = (
    "mkdir",
    "replace",
    "rename",
    "link",
    "unlink",
    "rmdir",
    "open",
    "stat",
    "lstat",
    "listdir",
    "scandir",
    "chmod",
)


def drawn(count: int, seed: int = 0, *, full: int | None = None) -> list[int]:
    """Which of ``count`` points to try, counted from 1: 4 of them in the quick run, otherwise all, or ``full``."""
    return effort_drawn(range(1, count + 1), quick=4, full=full, seed=seed)


def forked(act: Callable[[], object], *, kill_after: float | None = None) -> bool:
    """Runs something in a forked process. Returns whether it was killed.

    Args:
        act: what; it may kill its own process.
        kill_after: seconds after which it is killed, or None.
    """
    with tempfile.TemporaryFile() as output:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                act()
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        code = _ended(child)
        output.seek(0)
        written = output.read().decode(errors="replace")
    assert code in (0, -signal.SIGKILL), f"the write ended with {code}:\n{written}"
    return code == -signal.SIGKILL


def _ended(child: int) -> int:
    """The exit code of a process; one that does not end is killed and fails the test.

    A lock that another thread held at the fork is never released in the child.
    """
    start = time.monotonic()
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        waited = time.monotonic() - start
        if waited > CHILD_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"the forked process did not end within {CHILD_SECONDS} s")
        time.sleep(min(0.02, 0.001 + waited / 20))


@contextmanager
def after_call(number: int, act: Callable[[], object]) -> Iterator[list[str]]:
    """Acts after the n-th call that changes the disk; gives the calls as they come."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in DURABLE:
            patch.setattr(os, name, _acting(name, getattr(os, name), calls, number, act))
        yield calls


def _acting(name: str, original: Any, calls: list[str], number: int, act: Callable[[], object]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == number:
            act()
        return result

    return call


def die() -> None:
    """Ends this process at once, as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def failing_call(number: int, error: OSError, root: Path) -> Iterator[list[str]]:
    """Lets the n-th call about a path below ``root``, or that flushes a file, fail; gives the calls as they come."""
    calls: list[str] = []

    def failing(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "fsync" or (args and _below(args[0], root)):
                calls.append(name)
                if len(calls) == number:
                    raise error
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (*PATHS, "fsync"):
            patch.setattr(os, name, failing(name, getattr(os, name)))
        opener = failing("open file", builtins.open)
        patch.setattr(builtins, "open", opener)
        patch.setattr(io, "open", opener)
        yield calls


def _below(path: object, root: Path) -> bool:
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(root))
