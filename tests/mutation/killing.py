"""Runs tests in a forked process in which one module has a fault."""

from __future__ import annotations

import importlib.util
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Literal

import pytest

from tests.mutation.mutants import Mutant
from tests.mutation.reach import QUICK, ROOT

MEMORY = 8 << 30
"""Bytes that a fork may take."""
WALL_SECONDS = 600
"""After which a fork that waits for something is ended."""


@dataclass(frozen=True)
class Outcome:
    """What became of the tests.

    Attributes:
        ended: whether all passed, one failed, or the time was up.
        killer: the test that failed first, or None.
    """

    ended: Literal["passed", "failed", "time"]
    killer: str | None = None


class MutantFinder(MetaPathFinder):
    """Imports one module with its fault, whatever was compiled of it before."""

    def __init__(self, mutant: Mutant, root: Path = ROOT) -> None:
        self._path = root / mutant.path
        parts = Path(mutant.path).with_suffix("").parts
        self._is_package = parts[-1] == "__init__"
        self._name = ".".join(parts[:-1] if self._is_package else parts)
        self._source = mutant.apply(self._path.read_text(encoding="utf-8"))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's, if it is the one with the fault."""
        if fullname != self._name:
            return None
        loader = _MutantLoader(fullname, str(self._path), self._source)
        places = [str(self._path.parent)] if self._is_package else None
        return importlib.util.spec_from_file_location(
            fullname, self._path, loader=loader, submodule_search_locations=places
        )


class _MutantLoader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, source: str) -> None:
        super().__init__(fullname, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec", dont_inherit=True)


class _FirstFailure:
    """A plugin that remembers what failed first."""

    nodeid: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.nodeid = self.nodeid or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.nodeid = self.nodeid or report.nodeid


def import_in_advance() -> None:
    """Imports what tests need and what no fault is in, once for all forks."""
    for name in ("hypothesis", "numpy", "torch", "safetensors.torch", "transformers", "peft", "accelerate"):
        importlib.import_module(name)
    transformers = sys.modules["transformers"]
    for name in ("Trainer", "LlamaForCausalLM", "GPT2LMHeadModel", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    assert "nbpeft" not in sys.modules, "a module that is imported already would be without its fault"


def run(tests: Sequence[str], mutant: Mutant | None, seconds: float) -> Outcome:
    """Runs tests until one fails.

    Args:
        tests: their ids, or paths.
        mutant: the fault, or None.
        seconds: of processor time that they may take, after which they count as failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="nbpeft-mutation-"))
    note = folder / "failed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                _in_fork(tests, mutant, seconds, folder, note)
            finally:
                os._exit(70)
        status = _wait(child)
        if os.WIFSIGNALED(status) or not note.exists():
            return Outcome("time")
        code, killer = pickle.loads(note.read_bytes())
        return Outcome("passed") if code == 0 else Outcome("failed", killer or tests[0])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_fork(tests: Sequence[str], mutant: Mutant | None, seconds: float, folder: Path, note: Path) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    printed = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(printed, number)
    places = folder / "tmp" / "of" / "tests"
    places.mkdir(parents=True)
    tempfile.tempdir = None
    os.environ.update(TMPDIR=str(places), XDG_STATE_HOME=str(places), NBPEFT_RUNS=str(places / "runs"))
    if mutant is not None:
        sys.meta_path.insert(0, MutantFinder(mutant))
    first = _FirstFailure()
    options = ["-q", "-x", "-m", QUICK, "-p", "no:cacheprovider", f"--basetemp={places / 'base'}"]
    code = pytest.main([*options, *tests], [first])
    note.write_bytes(pickle.dumps((int(code), first.nodeid)))
    os._exit(0)


def _wait(child: int) -> int:
    end = time.monotonic() + WALL_SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]
