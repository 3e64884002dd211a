"""A write that fails or dies leaves a pair of files that belong together, always."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nbpeft.checkpoint import read_checkpoint, read_config, write_checkpoint, write_config
from nbpeft.checkpoint.atomic import NewFile, in_place_of, new_folder, replace_files
from nbpeft.checkpoint.staging import STAGING_PREFIX, Staging, mark_of, staging_name
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import CheckpointError, CheckpointNotFoundError

STEPS = ("mkdir", "replace", "link", "fsync")
"""Calls of ``os`` that a write makes, in some order; each of them can fail."""


def adapter(rank: int) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    tensors = {
        "base_model.model.q.lora_A.weight": torch.full((rank, 4), float(rank)),
        "base_model.model.q.lora_B.weight": torch.full((4, rank), float(rank)),
    }
    return LoraConfig(r=rank, target_modules=["q"]), tensors


def rank_of_pair(folder: Path) -> int:
    """The rank that config and tensors agree on."""
    checkpoint = read_checkpoint(folder)
    assert isinstance(checkpoint.config, LoraConfig)
    ranks = {checkpoint.config.r, len(checkpoint.tensors["base_model.model.q.lora_A.weight"])}
    ranks |= {int(tensor.flatten()[0]) for tensor in checkpoint.tensors.values()}
    config = read_config(folder)
    assert isinstance(config, LoraConfig)
    ranks.add(config.r)
    assert len(ranks) == 1, f"config and tensors disagree: {ranks}"
    return ranks.pop()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at_step(number: int, act: Callable[[], None], patch: pytest.MonkeyPatch) -> list[str]:
    """Lets the n-th step of a write act instead; returns the steps as they come."""
    steps: list[str] = []
    for name in STEPS:
        original: Any = getattr(os, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            steps.append(_name)
            if len(steps) == number:
                act()
            return _original(*args, **kwargs)

        patch.setattr(os, name, counted)
    return steps


def number_of_steps(tmp_path: Path) -> int:
    write_checkpoint(tmp_path / "count", *adapter(2))
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(0, lambda: None, patch)
        write_checkpoint(tmp_path / "count", *adapter(3))
    assert steps.count("replace") == 3
    return len(steps)


def fail_with(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError, "no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), CheckpointError, "no permission to write"),
        (OSError(errno.EIO, "Input/output error"), CheckpointError, "nothing was changed"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_an_error_at_any_step_changes_nothing(
    error: BaseException, raised: type[BaseException], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    write_checkpoint(folder, *adapter(2))
    before = contents(folder)
    steps = number_of_steps(tmp_path)
    failed = 0
    for number in range(1, steps + 1):
        with pytest.MonkeyPatch.context() as patch:
            at_step(number, fail_with(error), patch)
            try:
                write_checkpoint(folder, *adapter(3))
            except raised as caught:
                failed += 1
                assert words in str(caught)
                assert "\n" not in str(caught)
        if contents(folder) != before:
            # A file system may lack links and refuse to flush folders: then the write goes on.
            assert rank_of_pair(folder) == 3
            assert contents(folder).keys() == before.keys()
            write_checkpoint(folder, *adapter(2))
            before = contents(folder)
        assert not list(folder.glob(f"{STAGING_PREFIX}*"))
    assert failed >= steps - 9


def test_a_new_folder_may_have_files_that_cannot_be_written_and_links(tmp_path: Path) -> None:
    with new_folder(tmp_path, "checkpoint-2") as folder:
        folder.mkdir()
        (folder / "modeling.py").write_text("code")
        (folder / "modeling.py").chmod(0o444)
        (folder / "previous").symlink_to("../checkpoint-1/model.safetensors")
    assert sorted(path.name for path in (tmp_path / "checkpoint-2").iterdir()) == ["modeling.py", "previous"]


def test_an_error_leaves_no_new_folder(tmp_path: Path) -> None:
    for number in range(1, number_of_steps(tmp_path)):
        with pytest.MonkeyPatch.context() as patch:
            at_step(number, fail_with(OSError(errno.EIO, "Input/output error")), patch)
            try:
                write_checkpoint(tmp_path / "a" / "b" / "c", *adapter(2))
            except CheckpointError:
                assert not (tmp_path / "a").exists()
            else:
                shutil.rmtree(tmp_path / "a")


def dies(write: Callable[[], object]) -> bool:
    """Whether a write, in a process of its own, dies on its way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            write()
            os._exit(0)
        except BaseException:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the write died, nothing else"
    return code == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_death_at_any_step_leaves_the_old_pair_or_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    found: list[int] = []
    torn = 0
    for number in range(1, number_of_steps(tmp_path) + 1):
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder, *adapter(2))

        def write(step: int = number) -> None:
            with pytest.MonkeyPatch.context() as patch:
                at_step(step, lambda: os._exit(9), patch)
                write_checkpoint(folder, *adapter(3))

        assert dies(write)
        found.append(rank_of_pair(folder))
        text = (folder / "adapter_config.json").read_text()
        torn += found[-1] == 3 and '"r": 2' in text
        again = 2 + 2 * (number % 2)  # the old config, which is in its place still, or another
        write_checkpoint(folder, *adapter(again))
        assert rank_of_pair(folder) == again
        assert f'"r": {again}' in (folder / "adapter_config.json").read_text()
    assert found == sorted(found), "once the new pair counts it stays"
    assert set(found) == {2, 3}
    assert torn, "the moment between two moves was among them"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_death_in_a_new_folder_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    for number in range(1, number_of_steps(tmp_path)):
        folder = tmp_path / f"new{number}"

        def write(step: int = number, target: Path = folder) -> None:
            with pytest.MonkeyPatch.context() as patch:
                at_step(step, lambda: os._exit(9), patch)
                write_checkpoint(target, *adapter(3))

        if dies(write):
            try:
                assert rank_of_pair(folder) == 3
            except CheckpointNotFoundError:
                assert not (folder / "adapter_config.json").exists()
        write_checkpoint(folder, *adapter(4))
        assert rank_of_pair(folder) == 4


def test_litter_of_a_dead_write_goes_with_the_next_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *adapter(2))
    litter = tmp_path / staging_name(tmp_path)
    litter.mkdir()
    (litter / "adapter_model.safetensors").write_bytes(b"x" * 100)
    running = Staging(tmp_path)
    (tmp_path / f"{STAGING_PREFIX}mine").mkdir()
    write_checkpoint(tmp_path, *adapter(3))
    assert {path.name for path in tmp_path.glob(f"{STAGING_PREFIX}*")} == {running.path.name, f"{STAGING_PREFIX}mine"}
    running.close()
    assert not running.path.exists()


def test_where_folders_cannot_be_locked_only_old_litter_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    new, old = Staging(tmp_path), Staging(tmp_path)
    os.utime(old.path, (time.time() - 200_000,) * 2)
    write_checkpoint(tmp_path, *adapter(3))
    assert list(tmp_path.glob(f"{STAGING_PREFIX}*")) == [new.path]


def test_moves_that_a_file_notes_stay_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_checkpoint(folder, *adapter(2))
    litter = folder / staging_name(folder)
    litter.mkdir()
    (litter / "b").write_text("theirs")
    (folder / "a").write_text("moved")
    (tmp_path / "b").write_text("mine")
    (litter / ".moves").write_text(json.dumps({"a": mark_of(folder, "a"), "../b": [6, 0]}))
    write_checkpoint(folder, *adapter(3))
    assert (tmp_path / "b").read_text() == "mine"


def test_the_same_config_is_not_written_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *adapter(2))
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    config, tensors = adapter(2)
    write_checkpoint(tmp_path, config, {key: tensor + 1 for key, tensor in tensors.items()})
    after = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"adapter_model.safetensors"}


@pytest.fixture
def writes_fail(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def save_file(tensors: object, path: str, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    yield


def test_a_full_disk_as_safetensors_reports_it(tmp_path: Path, writes_fail: None) -> None:
    with pytest.raises(CheckpointError, match=r"no space left on the disk .* are needed, .* MB are free"):
        write_checkpoint(tmp_path / "x", *adapter(2))
    assert not (tmp_path / "x").exists()


def test_a_disk_that_is_known_to_be_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(CheckpointError, match="no space left") as caught:
        write_checkpoint(tmp_path / "x", *adapter(2))
    assert caught.value.details["free"] == 10
    assert not (tmp_path / "x").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    for target in (tmp_path / "x", tmp_path / "x" / "y"):
        with pytest.raises(CheckpointError, match="not a folder"):
            write_checkpoint(target, *adapter(2))
    assert (tmp_path / "x").read_text() == "mine"


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    for rank in (2, 3):
        write_checkpoint(tmp_path, *adapter(rank))
        assert rank_of_pair(tmp_path) == rank


def test_a_config_alone_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_config(LoraConfig(r=2), tmp_path)
    for number in range(1, 10):
        with pytest.MonkeyPatch.context() as patch:
            at_step(number, fail_with(OSError(errno.EIO, "Input/output error")), patch)
            try:
                write_config(LoraConfig(r=3), tmp_path)
            except CheckpointError:
                config = read_config(tmp_path)
                assert isinstance(config, LoraConfig)
                assert config.r == 2
        write_config(LoraConfig(r=2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_a_folder_is_replaced_once_the_new_one_is_complete(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "shipped", *adapter(2))
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), in_place_of(tmp_path / "shipped", allowed=True) as place:
        write_checkpoint(place, *adapter(3))
        assert rank_of_pair(tmp_path / "shipped") == 2
        raise KeyboardInterrupt
    assert contents(tmp_path) == before
    with pytest.raises(CheckpointError, match="No such file"), in_place_of(tmp_path / "shipped", allowed=True):
        pass  # the block wrote nothing
    assert contents(tmp_path) == before
    with in_place_of(tmp_path / "shipped", allowed=True) as place:
        write_checkpoint(place, *adapter(3))
    assert rank_of_pair(tmp_path / "shipped") == 3 and os.listdir(tmp_path) == ["shipped"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_that_cannot_be_replaced_is_put_back(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename fails: that of the old folder, or that of the new one once the old one is aside."""
    write_checkpoint(tmp_path / "shipped", *adapter(2))
    before = contents(tmp_path)
    renames, replace = itertools.count(1), os.replace

    def failing(*paths: Any) -> None:
        if next(renames) == number:
            raise OSError(errno.EIO, "Input/output error")
        replace(*paths)

    with pytest.raises(CheckpointError), in_place_of(tmp_path / "shipped", allowed=True) as place:
        write_checkpoint(place, *adapter(3))
        monkeypatch.setattr(os, "replace", failing)
    assert contents(tmp_path) == before


def test_an_error_names_the_folder_that_is_replaced(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    (tmp_path / "shipped").mkdir()
    with pytest.raises(CheckpointError) as raised, in_place_of(tmp_path / "shipped", allowed=True) as place:
        replace_files(place, [NewFile("a", full)])
    assert str(raised.value) == f"no space left on the disk for {tmp_path / 'shipped'}; nothing was changed"


def test_files_in_folders_of_folders(tmp_path: Path) -> None:
    """In any order, also into a folder that another file has made."""
    (tmp_path / "folder").mkdir()
    for text in ("old", "new"):
        replace_files(tmp_path / "folder", [NewFile.of_text(name, text) for name in ("a/b/x", "a/y", "z")])
        assert set(contents(tmp_path / "folder").values()) == {text.encode()}


def test_what_exists_is_not_replaced_unless_that_is_allowed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "shipped", *adapter(2))
    before = contents(tmp_path)
    with (
        pytest.raises(CheckpointError, match="already exists; choose another folder"),
        in_place_of(tmp_path / "shipped", allowed=False),
    ):
        raise AssertionError("the block ran")
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    with in_place_of(tmp_path / "empty", allowed=False) as place:
        assert place == tmp_path / "empty"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """The inodes that are flushed, and the names of what is moved, in their order."""
    seen: list[int | str] = []
    replace = os.replace

    def noting(source: Any, goal: Any, **options: Any) -> None:
        seen.append(os.path.basename(os.fspath(goal)))
        replace(source, goal, **options)

    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", noting)
    return seen


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in (folder, *folder.rglob("*"))}


def test_a_new_folder_is_flushed_with_all_in_it_before_it_is_moved(tmp_path: Path, calls: list[int | str]) -> None:
    replace_files(tmp_path / "new", [NewFile.of_text(name, "x") for name in ("a/b/x", "a/y", "z")])
    assert inodes(tmp_path / "new") <= set(calls[: calls.index("new")])
    assert tmp_path.stat().st_ino in calls[calls.index("new") :]


def test_a_folder_in_place_of_another_is_flushed_before_it_is_moved(tmp_path: Path, calls: list[int | str]) -> None:
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "old").touch()
    with in_place_of(tmp_path / "shipped", allowed=True) as place:
        place.mkdir()
        (place / "weights").write_bytes(b"new")
        calls.clear()
    assert os.listdir(tmp_path / "shipped") == ["weights"]
    last = len(calls) - 1 - calls[::-1].index("shipped")
    assert inodes(tmp_path / "shipped") <= set(calls[:last])
    assert tmp_path.stat().st_ino in calls[last:]


def test_files_beside_others_are_flushed_with_their_folders_before_the_first_is_moved(
    tmp_path: Path, calls: list[int | str]
) -> None:
    (tmp_path / "folder").mkdir()
    replace_files(tmp_path / "folder", [NewFile.of_text(name, "x") for name in ("a/x", "y")])
    first = min(calls.index(name) for name in ("x", "y"))
    files = {(tmp_path / "folder" / name).stat().st_ino for name in ("a/x", "y")}
    assert files <= set(calls[:first])
    assert {(tmp_path / "folder" / name).stat().st_ino for name in (".", "a")} <= set(calls[first:])
