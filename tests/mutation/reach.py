"""Which tests reach which line: a plugin of pytest that measures it, and what reads that again."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.mutation.importing import Importer
from tests.mutation.marks import MARKS, marked, memory, offsets, statement_line
from tests.mutation.mutants import Mutant
from tests.mutation.scope import FOLDER, ROOT, digest, paths

QUICK = "not (slow or browser or long)"
PART = "NBPEFT_MUTATION_PART"
"""The environment variable that names what is measured."""


class ReachPlugin:
    """Notes the statements that each test reaches, and its seconds of processor time, if it passes."""

    def __init__(self) -> None:
        self._memory = memory()
        self._starts = offsets()
        setattr(builtins, MARKS, self._memory)
        sys.meta_path.insert(0, Importer({path: partial(marked, path, start) for path, start in self._starts.items()}))
        self._reached: dict[str, bytes] = {}
        self._seconds: dict[str, float] = {}
        self._failed: set[str] = set()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Runs a test, and takes its marks."""
        self._memory[:] = bytes(len(self._memory))
        start = time.process_time()
        result = yield
        self._seconds[item.nodeid] = round(time.process_time() - start, 4)
        self._reached[item.nodeid] = np.packbits(np.frombuffer(self._memory, np.uint8)).tobytes()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes tests that do not pass, which notice nothing."""
        if report.outcome != "passed":
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Writes what was measured, and of which sources."""
        passed = [test for test in self._seconds if test not in self._failed]
        noted = {
            "tests": passed,
            "seconds": [self._seconds[test] for test in passed],
            "starts": self._starts,
            "sources": {path: digest(path) for path in paths()},
        }
        FOLDER.mkdir(parents=True, exist_ok=True)
        rows = np.frombuffer(b"".join(self._reached[test] for test in passed), np.uint8).reshape(len(passed), -1)
        np.savez_compressed(FOLDER / f"{os.environ[PART]}.npz", rows=rows, noted=json.dumps(noted))


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Starts before anything of nbpeft is imported, also by a conftest; pytest loads this module by ``-p``."""
    assert not any(name.startswith("nbpeft.") for name in sys.modules)
    early_config.pluginmanager.register(ReachPlugin())


def measure(tests: Sequence[str]) -> int:
    """Runs quick tests with this plugin. Returns pytest's status.

    Args:
        tests: paths of tests; none of them are all. What was measured of other tests before stays.
    """
    part = f"reach-{hashlib.sha256(' '.join(sorted(tests)).encode()).hexdigest()[:8]}"
    options = ("-q", "-m", QUICK, "-p", "no:cacheprovider", "-p", "tests.mutation.reach", *tests)
    environment = {**os.environ, "NBPEFT_TESTS": "quick", PART: part}
    return subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, env=environment).returncode


class Reached:
    """What `ReachPlugin` measured, in all its runs.

    Args:
        left_out: tests that are taken for none.
    """

    def __init__(self, left_out: Set[str] = frozenset()) -> None:
        self.seconds: dict[str, float] = {}
        self._left_out = left_out
        self._reaching: dict[str, list[tuple[list[str], np.ndarray]]] = {}
        for file in sorted(FOLDER.glob("reach-*.npz"), key=lambda file: file.stat().st_mtime):
            self._read(file)
        if not self.seconds:
            raise SystemExit("which test reaches which line is not known yet: python -m tests.mutation --reach")

    def _read(self, file: Path) -> None:
        data = np.load(file)
        noted = json.loads(str(data["noted"]))
        self.seconds |= dict(zip(noted["tests"], noted["seconds"], strict=True))
        columns = np.unpackbits(data["rows"], axis=1)
        for path in paths():
            if noted["sources"].get(path) == digest(path):
                start = noted["starts"][path]
                end = min((each for each in noted["starts"].values() if each > start), default=columns.shape[1])
                self._reaching.setdefault(path, []).append((noted["tests"], columns[:, start:end].copy()))

    def check_is_current(self, path: str) -> None:
        """Ends the program if a file has changed since it was measured: its lines are others now."""
        if path not in self._reaching:
            raise SystemExit(f"{path} has changed since it was measured: python -m tests.mutation --reach")

    def of_lines(self, path: str, first: int, last: int) -> set[str]:
        """The tests that run a statement."""
        line = statement_line(path, first, last)
        return {tests[row] for tests, lines in self._reaching[path] for row in np.flatnonzero(lines[:, line])}

    def of_file(self, path: str) -> set[str]:
        """The tests that run any statement of a file."""
        return {tests[row] for tests, lines in self._reaching[path] for row in np.flatnonzero(lines.any(axis=1))}

    def tests(self, mutant: Mutant) -> list[str]:
        """The tests that reach a mutant's lines, those first that probably notice it soonest.

        What acts when a module is imported is reached by each test that runs any line of it; by all, if there is none.
        """
        found = self.of_lines(mutant.path, *mutant.lines) if mutant.in_function else set()
        found = found or self.of_file(mutant.path) or {*self.seconds}
        return self._ordered(found - self._left_out, mirror_of(mutant.path))

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
