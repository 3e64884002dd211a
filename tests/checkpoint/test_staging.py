"""Staging folders: the living are left alone, the dead are swept, and what they were at is settled."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from nbpeft.checkpoint import staging as staging_module
from nbpeft.checkpoint.staging import (
    ASIDE,
    OLD,
    STAGING_PREFIX,
    Staging,
    discard,
    make_folder,
    mark_of,
    scratch_folder,
    staging_name,
    sweep,
)
from nbpeft.errors import CheckpointError


def test_temporary_folders_of_the_dead_go_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / staging_name(tmp_path)).mkdir()
    (tmp_path / "nbpeft-mine").mkdir()
    with scratch_folder() as living:
        assert living.stat().st_mode & 0o777 == 0o700
        (living / "x").write_text("x")
        with scratch_folder() as other:
            assert {path.name for path in tmp_path.iterdir()} == {living.name, other.name, "nbpeft-mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["nbpeft-mine"]


def test_temporary_folders_of_others_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    strange = tmp_path / f"{STAGING_PREFIX}{'0' * 32}"
    strange.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with scratch_folder():
            pass
    assert strange.is_dir()
    with pytest.warns(UserWarning, match="into another folder"):
        sweep(tmp_path)


def test_no_temporary_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"no temporary folder can be made in .*none"), scratch_folder():
        pass


def test_one_thread_does_not_sweep_what_another_writes(tmp_path: Path) -> None:
    staging = Staging(tmp_path)
    thread = threading.Thread(target=sweep, args=(tmp_path,))
    thread.start()
    thread.join()
    assert staging.path.is_dir()
    staging.close()


def test_a_folder_that_cannot_be_looked_at_is_not_used_without_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be swept as one of the dead while files are written into it."""

    def failing(path: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", failing)
        with pytest.raises(OSError, match="Input/output error"):
            staging_module.lock_folder(tmp_path)


def test_a_sweep_that_comes_at_once_makes_another_folder_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    mkdir = os.mkdir

    def swept_at_once(path: str, mode: int = 0o777) -> None:
        mkdir(path, mode)
        made.append(str(path))
        if len(made) == 1:
            sweep(tmp_path)

    monkeypatch.setattr(os, "mkdir", swept_at_once)
    staging = Staging(tmp_path)
    assert len(made) == 2 and staging.path == Path(made[1]) and staging.path.is_dir()
    staging.close()


def half_moved(folder: Path, second: str = "b") -> None:
    """A write of ``a`` and ``b`` over an old ``a``, that died between its two moves."""
    staging = Staging(folder)
    (staging.path / second).parent.mkdir(exist_ok=True)
    for name in ("a", second):
        (staging.path / name).write_text(f"new {name}")
    staging.note_moves({name: mark_of(staging.path, name) or (0, 0) for name in ("a", second)})
    (staging.path / OLD).mkdir()
    (staging.path / OLD / "a").write_text("old a")
    os.replace(staging.path / "a", folder / "a")
    os.close(staging._lock or 0)


def test_what_was_begun_is_ended_or_taken_back(tmp_path: Path) -> None:
    half_moved(tmp_path)
    sweep(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new a", "b": "new b"}
    (tmp_path / "b").unlink()
    half_moved(tmp_path)
    sweep(tmp_path, finish=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old a"}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users have no numbers here")
def test_what_another_user_writes_is_left_alone_and_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_moved(tmp_path)
    before, own = sorted(tmp_path.rglob("*")), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with warnings.catch_warnings(action="error"):
        sweep(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_begun_is_ended_in_a_folder_that_is_new(tmp_path: Path) -> None:
    half_moved(tmp_path, "folder/b")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "folder"]
    assert (tmp_path / "folder" / "b").read_text() == "new folder/b"


def test_what_was_written_since_stays(tmp_path: Path) -> None:
    half_moved(tmp_path)
    (tmp_path / "a").write_text("newer than both")
    sweep(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "newer than both"}


def test_a_folder_that_made_room_goes_back_into_an_empty_place(tmp_path: Path) -> None:
    for place in (True, False):
        aside = tmp_path / staging_name(tmp_path) / ASIDE / "checkpoint-2"
        aside.mkdir(parents=True)
        (aside / "old").touch()
        if place:
            (tmp_path / "checkpoint-2").mkdir()
        sweep(tmp_path)
        assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint-2"] + ["old"] * (not place)
        if place:
            (tmp_path / "checkpoint-2").rmdir()


@pytest.mark.parametrize("call", ["listdir", "stat", "open"])
def test_what_cannot_be_seen_is_not_removed(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery during which a call fails is left to the next one, which has all that it needs."""
    for number in range(1, 40):
        home = tmp_path / f"{number}"
        home.mkdir()
        half_moved(home)
        aside = Staging(home)
        (aside.path / ASIDE / "folder").mkdir(parents=True)
        (aside.path / ASIDE / "folder" / "x").write_text("x")
        os.close(aside._lock or 0)
        original: Any = getattr(os, call)
        calls: list[int] = []

        def failing(*args: Any, original: Any = original, calls: list[int] = calls, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == number:  # noqa: B023
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            sweep(home)
        sweep(home)
        assert [(home / name).read_text() for name in ("a", "b", "folder/x")] == ["new a", "new b", "x"], number
        assert sorted(path.name for path in home.iterdir()) == ["a", "b", "folder"]
        if len(calls) < number:
            return


def test_what_is_discarded_is_moved_away_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-1" / "weights").touch()
    flushed: list[list[str]] = []
    monkeypatch.setattr(staging_module, "flush_folder", lambda folder: flushed.append(os.listdir(tmp_path / "run")))
    discard(tmp_path, [])
    assert flushed == []
    discard(tmp_path, ["run/checkpoint-1"])
    assert flushed == [[]] and os.listdir(tmp_path) == ["run"]


def test_a_new_folder_is_flushed_in_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(staging_module, "flush_folder", flushed.append)
    for made in ([tmp_path / "a", tmp_path / "a" / "b"], []):
        found: list[Path] = []
        make_folder(tmp_path / "a" / "b", found)
        assert found == made and flushed == [path.parent for path in made]
        flushed.clear()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file", [])


def test_flushing_a_folder_leaves_no_file_open(tmp_path: Path) -> None:
    def lowest_free() -> int:
        handle = os.open(tmp_path, os.O_RDONLY)
        os.close(handle)
        return handle

    before = lowest_free()
    staging_module.flush_folder(tmp_path)
    assert lowest_free() == before
