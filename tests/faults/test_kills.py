"""A write that is killed, wherever it is, leaves the old state or the new one, and the next write succeeds."""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from nbpeft.errors import CheckpointError
from tests.effort import TIER
from tests.faults.killing import KILLS, after_call, die, drawn, failing_call, forked
from tests.faults.writers import NEW, OLD, Models, Writer, litter, writers

WRITERS = (
    *("save one", "save one anew", "save several", "card", "merge", "merge into shards", "merge beside other files"),
    *("export", "ship", "checkpoint", "checkpoint of transformers' Trainer"),
)
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of their own, to see what is left in it."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def begun(writer: Writer, home: Path) -> Path:
    """A folder with the first state in it, or none."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    if writer.begin:
        writer.write(home / "target", OLD)
    return home / "target"


def check_what_is_left(writer: Writer, folder: Path, scratch: Path) -> set[int]:
    """Old or new, and the same again succeeds and clears up. Returns what was there."""
    before = writer.found(folder) if folder.exists() else set()
    assert before <= {OLD, NEW}
    writer.write(folder, NEW)
    assert NEW in writer.found(folder)
    assert litter(folder) == [] and list(scratch.iterdir()) == []
    return before


@pytest.mark.drawn(5)
@pytest.mark.parametrize("name", WRITERS)
def test_kills_at_random_moments(name: str, models: Models, tmp_path: Path, scratch: Path) -> None:
    writer, draw = writers(models)[name], random.Random(name)
    folder = begun(writer, tmp_path / "home")
    writer.write(folder, NEW)  # what is made once is made now
    folder = begun(writer, tmp_path / "home")
    started = time.perf_counter()
    forked(lambda: writer.write(folder, NEW))
    seconds = time.perf_counter() - started
    for _ in range(KILLS):
        folder = begun(writer, tmp_path / "home")
        forked(functools.partial(writer.write, folder, NEW), kill_after=draw.uniform(0, 1.2 * seconds))
        check_what_is_left(writer, folder, scratch)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", WRITERS)
def test_kills_after_each_call(name: str, models: Models, tmp_path: Path, scratch: Path) -> None:
    writer = writers(models)[name]
    folder = begun(writer, tmp_path / "home")
    with after_call(0, die) as calls:
        writer.write(folder, NEW)
    assert calls.count("fsync") and calls.count("replace")
    assert NEW in writer.found(folder)
    found: list[set[int]] = []
    for number in drawn(len(calls), seed=list(WRITERS).index(name), full=30):
        folder = begun(writer, tmp_path / "home")
        with after_call(number, die):
            assert forked(functools.partial(writer.write, folder, NEW))
        found.append(check_what_is_left(writer, folder, scratch))
    news = [NEW in states for states in found]
    assert news == sorted(news), "once the new state is there it stays"


ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", WRITERS)
def test_a_call_that_fails_changes_nothing(name: str, models: Models, tmp_path: Path, scratch: Path) -> None:
    writer = writers(models)[name]
    folder = begun(writer, tmp_path / "home")
    with failing_call(0, OSError(), tmp_path) as calls:
        writer.write(folder, NEW)
    refused = 0
    for position, number in enumerate(drawn(len(calls), seed=100 + list(WRITERS).index(name))):
        folder = begun(writer, tmp_path / "home")
        before = contents(tmp_path / "home")
        code = ERRORS[position % len(ERRORS)]
        error: Any = OSError(code, os.strerror(code), str(folder))
        try:
            with failing_call(number, error, tmp_path):
                writer.write(folder, NEW)
        except CheckpointError as told:
            refused += 1
            assert "\n" not in str(told) and len(str(told)) < 500
            assert contents(tmp_path / "home") == before
            assert litter(folder) == [] and list(scratch.iterdir()) == []
        else:  # a call whose failure does not matter, as one that clears up
            assert NEW in writer.found(folder)
        check_what_is_left(writer, folder, scratch)
    assert refused or TIER == "quick"
