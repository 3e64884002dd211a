"""Which tests reach which line: a plugin of pytest that measures it with coverage, and what reads that again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "artifacts" / "mutation"
LINES = "lines.coverage"
TESTS = "tests.json"
QUICK = "not (slow or browser or long)"


class ReachPlugin:
    """Notes the lines of nbpeft that each test reaches, and its seconds of processor time, if it passes."""

    def __init__(self) -> None:
        from coverage import Coverage

        FOLDER.mkdir(parents=True, exist_ok=True)
        self.coverage = Coverage(data_file=FOLDER / LINES, source_pkgs=["nbpeft"], config_file=False)
        self.coverage.set_option("run:relative_files", True)
        self.coverage.erase()
        self.coverage.start()
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Runs a test in a context of its own."""
        self.coverage.switch_context(item.nodeid)
        start = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - start
        self.coverage.switch_context("")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes tests that do not pass, which notice nothing."""
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Writes what was measured, and of which sources."""
        self.coverage.stop()
        self.coverage.save()
        passed = {test: took for test, took in self.seconds.items() if test not in self.failed}
        sources = {path.relative_to(ROOT).as_posix(): digest(path) for path in (ROOT / "nbpeft").rglob("*.py")}
        (FOLDER / TESTS).write_text(json.dumps({"seconds": passed, "sources": sources}), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Starts measuring before anything of nbpeft is imported; pytest loads this module by ``-p``."""
    config.pluginmanager.register(ReachPlugin())


def digest(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def measure() -> int:
    """Runs the quick tests with this plugin. Returns pytest's status."""
    options = ("-q", "-m", QUICK, "-p", "no:cacheprovider", "-p", "tests.mutation.reach")
    command = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "NBPEFT_TESTS": "quick"}).returncode


class Reached:
    """What `ReachPlugin` measured."""

    def __init__(self) -> None:
        if not (FOLDER / TESTS).exists():
            raise SystemExit("which test reaches which line is not known yet: python -m tests.mutation --reach")
        noted = json.loads((FOLDER / TESTS).read_text(encoding="utf-8"))
        self.seconds: dict[str, float] = noted["seconds"]
        self._sources: dict[str, str] = noted["sources"]
        self._contexts: dict[str, dict[int, list[str]]] = {}

    @cached_property
    def _data(self) -> Any:
        from coverage import CoverageData

        data = CoverageData(str(FOLDER / LINES))
        data.read()
        return data

    def check_is_current(self, path: str) -> None:
        """Ends the program if a file has changed since it was measured: its lines are others now."""
        if self._sources.get(path) != digest(ROOT / path):
            raise SystemExit(f"{path} has changed since it was measured: python -m tests.mutation --reach")

    def tests(self, mutant: Mutant) -> list[str]:
        """The tests that reach a mutant's lines, those first that probably notice it soonest.

        What acts when its module is imported is reached by each test that reaches any line of it; a function that is
        called when other modules are imported, by all tests.
        """
        if mutant.path not in self._contexts:
            self._contexts[mutant.path] = self._data.contexts_by_lineno(mutant.path)
        contexts = self._contexts[mutant.path]
        first, last = mutant.lines
        lines = range(first, last + 1) if mutant.in_function else contexts
        names = {name for line in lines for name in contexts.get(line, ())}
        found = names & self.seconds.keys() or (set(self.seconds) if names else set())
        return self._ordered(found, mirror_of(mutant.path))

    def _ordered(self, tests: set[str], mirror: str) -> list[str]:
        """One case of each test before the second of any; in each round the file's own tests, then the quickest."""
        rounds: Counter[str] = Counter()
        keys = {}
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            function = test.partition("[")[0]
            keys[test] = (rounds[function], not test.startswith(mirror), self.seconds[test], test)
            rounds[function] += 1
        return sorted(tests, key=keys.__getitem__)


def mirror_of(path: str) -> str:
    """The test file of a source."""
    source = Path(path).relative_to("nbpeft")
    return f"tests/{(source.parent / f'test_{source.name}').as_posix()}"
