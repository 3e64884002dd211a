"""Runs tests in forked processes in each of which one module has a fault."""

from __future__ import annotations

import importlib
import os
import pickle
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mutation.importing import Importer, module_name
from tests.mutation.mutants import Mutant
from tests.mutation.patching import Functions, functions, put
from tests.mutation.reach import QUICK
from tests.mutation.scope import FOLDER, ROOT

MEMORY = 8 << 30
"""Bytes that a fork may take."""
AT_IMPORT = "acts when its module is imported"
TIME = "the time was up"

Found = list[str]
"""The tests that failed, or `TIME`, or `AT_IMPORT`; none if all passed."""


class Fork:
    """A process that does some work, with files and limits of its own.

    Args:
        work: what it does; its result is the fork's.
        seconds: of processor time.
        wall: of time; None is no limit.
    """

    def __init__(self, work: Callable[[], Found], seconds: float | None, wall: float | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="nbpeft-mutation-"))
        self._end = time.monotonic() + wall if wall else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process = os.fork()
        if self.process == 0:
            try:
                self._do(work, seconds)
            finally:
                os._exit(70)

    def _do(self, work: Callable[[], Found], seconds: float | None) -> None:
        os.setsid()
        if seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        places = self._folder / "tmp" / "of" / "tests"
        places.mkdir(parents=True)
        tempfile.tempdir = None
        changed = ("TMPDIR", "PYTEST_DEBUG_TEMPROOT", "NBPEFT_RUNS")
        os.environ.update(dict.fromkeys(changed, str(places)))
        note = self._folder / "note"
        note.write_bytes(pickle.dumps(work()))
        note.rename(self._folder / "found")
        os._exit(0)

    def found(self) -> Found | None:
        """What the work found; None while it goes on."""
        ended, _ = os.waitpid(self.process, os.WNOHANG)
        if not ended:
            if self._end is None or time.monotonic() < self._end:
                return None
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        file = self._folder / "found"
        found: Found = pickle.loads(file.read_bytes()) if file.exists() else [TIME]
        shutil.rmtree(self._folder, ignore_errors=True)
        return found

    def wait(self) -> Found:
        """What the work found, at its end."""
        while (found := self.found()) is None:
            time.sleep(0.05)
        return found


class _Failures:
    """A plugin that remembers what failed."""

    def __init__(self) -> None:
        self.found: Found = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.found.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.found.append(report.nodeid)


Job = tuple[Mutant | None, Sequence[str], float]
"""A fault or none, the tests that may notice it, and the seconds of processor time that they may take."""


class Judge:
    """A plugin that runs the collected tests of each job in a fork of the process that collected them.

    Args:
        jobs: which; one without tests has all that are collected.
        at_once: how many forks there are.
        tell: is given a job and what was found; at the end, without a fault, all tests that failed.
    """

    def __init__(self, jobs: Sequence[Job], at_once: int, tell: Callable[[Job, Found], None]) -> None:
        self._jobs = jobs
        self._at_once = at_once
        self._tell = tell

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Judges all faults, in the place of running the tests."""
        import_all("nbpeft")
        self._items = {item.nodeid: item for item in session.items}
        self._functions = functions()
        running: list[tuple[Job, Fork]] = []
        waiting = list(reversed(self._jobs))
        killers: set[str] = set()
        while waiting or running:
            while waiting and len(running) < self._at_once:
                job = waiting.pop()
                running.append((job, self._start(job)))
            for job, fork in list(running):
                found = fork.found()
                if found is not None:
                    running.remove((job, fork))
                    killers |= {*found} & self._items.keys()
                    self._tell(job, found)
            time.sleep(0.02)
        if killers:
            control = None, sorted(killers), float(len(killers))
            self._tell(control, self._start(control).wait())
        return True

    def _start(self, job: Job) -> Fork:
        mutant, tests, seconds = job
        items = [self._items[test] for test in tests if test in self._items] or list(self._items.values())
        return Fork(lambda: run_items(items, mutant, self._functions), 4 * seconds + 15, 40 * seconds + 240)


def run_items(items: Sequence[pytest.Item], mutant: Mutant | None, imported: Functions) -> Found:
    """Runs tests; with a fault, until one fails."""
    if mutant is not None:
        sys.meta_path.insert(0, with_fault(mutant))
        if module_name(mutant.path) in sys.modules and not put(mutant, imported):
            return [AT_IMPORT]
    failures = _Failures()
    items[0].config.pluginmanager.register(failures)
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if failures.found and mutant is not None:
            break
    return failures.found


def with_fault(mutant: Mutant, root: Path = ROOT) -> Importer:
    """Imports a module with its fault."""
    source = (root / mutant.path).read_text(encoding="utf-8")
    code = lambda: compile(mutant.apply(source), str(root / mutant.path), "exec", dont_inherit=True)  # noqa: E731
    return Importer({mutant.path: code}, root)


def import_in_advance() -> None:
    """Imports what tests need and what no fault is in, once for all forks."""
    for name in ("hypothesis", "numpy", "torch", "safetensors.torch", "transformers", "peft", "accelerate"):
        importlib.import_module(name)
    transformers = sys.modules["transformers"]
    for name in ("Trainer", "LlamaForCausalLM", "GPT2LMHeadModel", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    assert "nbpeft" not in sys.modules, "a module that is imported already would be without its fault"


def import_all(package: str) -> None:
    """Imports all modules of a package that can be imported here."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith(".__main__"):
            with suppress(Exception):
                importlib.import_module(module.name)


def judge(jobs: Sequence[Job], files: Sequence[str], at_once: int, tell: Callable[[Job, Found], None]) -> None:
    """Judges faults in functions, in forks of a process that has collected all tests.

    Args:
        jobs: what is judged.
        files: of their tests.
        at_once: how many forks there are.
        tell: is given a job and what was found.
    """

    def work() -> Found:
        code = _pytest(files, Judge(jobs, at_once, tell))
        return [] if code == pytest.ExitCode.OK else [str(code)]

    found = Fork(work, None).wait()
    if found:
        raise SystemExit(f"the tests could not be collected ({found[0]}): see {FOLDER / 'printed'}")


def run(tests: Sequence[str], mutant: Mutant, seconds: float) -> Found:
    """Runs tests until one fails, in a process that imports the module of a fault anew."""

    def work() -> Found:
        sys.meta_path.insert(0, with_fault(mutant))
        failures = _Failures()
        code = _pytest(tests, failures, "-x")
        return failures.found or ([tests[0]] if code else [])

    return Fork(work, 4 * seconds + 30, 40 * seconds + 240).wait()


def _pytest(tests: Sequence[str], plugin: object, *options: str) -> int:
    nothing = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(FOLDER / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, file in enumerate((nothing, printed, printed)):
        os.dup2(file, number)
    given = ("-q", "-m", QUICK, "-p", "no:cacheprovider", "--capture=sys", *options)
    return int(pytest.main([*given, *tests], [plugin]))
