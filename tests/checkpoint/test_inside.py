"""Files inside a folder: no link is followed, whoever made the folder."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbpeft.checkpoint import NewFile, in_place_of, inside, replace_files, write_checkpoint
from nbpeft.checkpoint.staging import ASIDE, OLD, mark_of, staging_name, sweep
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import CheckpointError


def tree(folder: Path) -> dict[str, Any]:
    """All that is in a folder, without following links: kind, content or goal, time of change."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        seen = path.lstat()
        content: Any = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (seen.st_mode, seen.st_mtime_ns, content)
    return found


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    folder = tmp_path / "victim"
    (folder / "startup").mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    (folder / "startup" / "00-first.py").write_text("import this")
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that somebody else made."""
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "notes.txt").write_text("hello")
    os.utime(folder / "notes.txt", (1, 1))
    return folder


def staging_in(folder: Path, whose: str) -> Path:
    name = staging_name(folder)
    names = {"own": name, "stranger's": name[:-16] + "0" * 16}
    (folder / names[whose]).mkdir()
    return folder / names[whose]


def moves(staging: Path, *names: str) -> None:
    """Notes moves of which the first was done."""
    marks = {"notes.txt": mark_of(staging.parent, "notes.txt")} | dict.fromkeys(names, (1, 1))
    (staging / ".moves").write_text(json.dumps(marks))


def aside_is_a_link(staging: Path, victim: Path) -> None:
    (staging / ASIDE).symlink_to(victim)


def staging_is_a_link(staging: Path, victim: Path) -> None:
    staging.rmdir()
    (victim / ASIDE / "out").mkdir(parents=True)
    staging.symlink_to(victim)


def a_link_on_the_way(staging: Path, victim: Path) -> None:
    (staging.parent / "link").symlink_to(victim / "startup")
    (staging / "link").mkdir()
    (staging / "link" / "evil.py").write_text("evil")
    moves(staging, "link/evil.py")


def a_link_in_the_staging_folder(staging: Path, victim: Path) -> None:
    (staging / "link").symlink_to(victim)
    moves(staging, "link/thesis.tex")


def links_on_both_sides(staging: Path, victim: Path) -> None:
    (staging.parent / "link").symlink_to(victim / "startup")
    (staging / "link").symlink_to(victim)
    moves(staging, "link/thesis.tex")


def old_is_a_link(staging: Path, victim: Path) -> None:
    (staging / OLD).symlink_to(victim)
    (staging / "waits").write_text("x")
    moves(staging, "thesis.tex", "waits")


def what_is_taken_back_goes_through_a_link(staging: Path, victim: Path) -> None:
    (staging.parent / "link").symlink_to(victim)
    (staging / "waits").write_text("x")
    marks = {"link/thesis.tex": mark_of(victim, "thesis.tex"), "waits": (1, 1)}
    (staging / ".moves").write_text(json.dumps(marks))


def names_that_lead_out(staging: Path, victim: Path) -> None:
    for name in ("../victim/startup/evil.py", str(victim / "startup" / "evil.py"), "a/../../victim/evil.py", "", "."):
        (staging / "evil").write_text("x")
        moves(staging, name)


def moves_is_a_link(staging: Path, victim: Path) -> None:
    (staging / ".moves").symlink_to(victim / "thesis.tex")


def moves_is_a_pipe(staging: Path, victim: Path) -> None:
    os.mkfifo(staging / ".moves")


def moves_is_a_device(staging: Path, victim: Path) -> None:
    (staging / ".moves").symlink_to("/dev/zero")


def moves_has_a_second_name(staging: Path, victim: Path) -> None:
    (victim / "marks").write_text(json.dumps({"notes.txt": [5, 10**9], "startup/evil.py": [1, 1]}))
    os.link(victim / "marks", staging / ".moves")
    (staging / "startup").symlink_to(victim / "startup")


def a_staged_link(staging: Path, victim: Path) -> None:
    (staging / "adapter_config.json").symlink_to(victim / "thesis.tex")
    moves(staging, "adapter_config.json")


def pipes_called_like_staging_folders(staging: Path, victim: Path) -> None:
    staging.rmdir()
    os.mkfifo(staging)


ATTACKS = (
    *(aside_is_a_link, staging_is_a_link, a_link_on_the_way, a_link_in_the_staging_folder, links_on_both_sides),
    *(old_is_a_link, what_is_taken_back_goes_through_a_link, names_that_lead_out, moves_is_a_link, moves_is_a_pipe),
    *(moves_is_a_device, moves_has_a_second_name, a_staged_link, pipes_called_like_staging_folders),
)


def save(folder: Path) -> None:
    shapes = {"lora_A": (2, 4), "lora_B": (4, 2)}
    tensors = {f"base_model.model.q.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    write_checkpoint(folder, LoraConfig(r=2, target_modules=["q"]), tensors)


def ship(folder: Path) -> None:
    """Beside what is in the folder, as a new one and in the place of another."""
    for text in ("first", "second"):
        with in_place_of(folder / "shipped", allowed=True) as place:
            replace_files(place, [NewFile.of_text("model.gguf", text)])


def take_back(folder: Path) -> None:
    sweep(folder, finish=False)


@pytest.mark.drawn(25)
@pytest.mark.parametrize(("whose", "write"), [("stranger's", save), ("own", save), ("own", take_back), ("own", ship)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_write_into_a_folder_touches_anything_outside(
    attack: Callable[[Path, Path], None], whose: str, write: Callable[[Path], None], clone: Path, victim: Path
) -> None:
    attack(staging_in(clone, whose), victim)
    before = tree(victim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(clone)
    assert tree(victim) == before
    assert whose == "own" or (clone / "notes.txt").read_text() == "hello"


def test_a_staging_folder_of_somebody_else_is_reported_and_stays(clone: Path) -> None:
    staging = staging_in(clone, "stranger's")
    (staging / ASIDE / "planted").mkdir(parents=True)
    before = tree(staging)
    with pytest.warns(
        UserWarning,
        match=rf"{staging.name} looks like the remains of an interrupted write into another .* it was not touched",
    ):
        save(clone)
    assert tree(staging) == before and not (clone / "planted").exists()


def test_a_copy_of_a_folder_of_ours_is_not_ours(clone: Path, tmp_path: Path) -> None:
    """Somebody may have changed it on its way."""
    name = staging_name(clone)
    (tmp_path / "copy" / name / ASIDE / "planted").mkdir(parents=True)
    with pytest.warns(UserWarning, match="into another folder"):
        sweep(tmp_path / "copy")
    assert not (tmp_path / "copy" / "planted").exists()


def test_a_folder_to_write_into_that_is_a_link_is_refused(clone: Path, victim: Path) -> None:
    """Though the folder that is named may be one."""
    (clone / "default").symlink_to(victim)
    before = tree(victim)
    with pytest.raises(CheckpointError, match=r"default is a link, and links inside a folder are not followed"):
        replace_files(clone, [NewFile.of_text("default/adapter_config.json", "{}")])
    assert tree(victim) == before and tree(clone).keys() == {"notes.txt", "default"}
    (clone.parent / "named").symlink_to(clone)
    replace_files(clone.parent / "named", [NewFile.of_text("new.txt", "x"), NewFile.of_text("sub/new.txt", "x")])
    assert (clone / "sub" / "new.txt").read_text() == "x"


def test_a_file_that_is_a_link_is_replaced_not_written_through(clone: Path, victim: Path) -> None:
    (clone / "adapter_config.json").symlink_to(victim / "thesis.tex")
    before = tree(victim)
    save(clone)
    assert tree(victim) == before and not (clone / "adapter_config.json").is_symlink()


@pytest.mark.parametrize("handles", [True, False])
def test_only_plain_files_are_opened(handles: bool, clone: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the calls of POSIX, and as on Windows."""
    monkeypatch.setattr(inside, "_HANDLES", handles)
    os.mkfifo(clone / "pipe")
    (clone / "link").symlink_to(victim / "thesis.tex")
    (clone / "zero").symlink_to("/dev/zero")
    (clone / "away").symlink_to(victim)
    (clone / "folder").mkdir()
    for name, reported in {
        "pipe": "pipe is a named pipe, not a plain file",
        "link": "link is a link, not a plain file",
        "zero": "zero is a link, not a plain file",
        "away/thesis.tex": "away is a link, and links inside a folder are not followed",
        "folder": "folder is a folder, not a plain file",
        "../victim/thesis.tex": "is not the name of a file inside",
        str(victim / "thesis.tex"): "is not the name of a file inside",
        "": "an empty name is not the name",
    }.items():
        with pytest.raises(CheckpointError, match=reported):
            inside.read_plain(clone, name, 100)
    assert inside.read_plain(clone, "notes.txt", 5) == b"hello"
    with pytest.raises(CheckpointError, match="has more than 4 bytes"):
        inside.read_plain(clone, "notes.txt", 4)
    with pytest.raises(FileNotFoundError):
        inside.read_plain(clone, "none/of/it", 4)
    os.link(victim / "thesis.tex", clone / "second")
    with pytest.raises(CheckpointError, match="has a second hard link, and is not written"):
        inside.open_plain(clone, "second", os.O_WRONLY | os.O_APPEND)
    assert inside.names(clone, "away") == [] and inside.names(victim, "startup") == ["00-first.py"]
    assert inside.first_not_plain(victim) is None and "is a" in str(inside.first_not_plain(clone))
    assert [inside.is_folder(clone, name) for name in ("folder", "away", "pipe")] == [True, False, False]
    assert inside.make_folders(clone, "a/b") == [clone / "a", clone / "a" / "b"]
    inside.second_name(clone, "notes.txt", "a/b/notes.txt")
    inside.move(clone, "a/b/notes.txt", clone, "moved.txt")
    inside.remove(clone, "moved.txt")
    inside.remove(clone, "moved.txt")
    for change in (
        lambda: inside.move(clone, "notes.txt", clone, "away/notes.txt"),
        lambda: inside.remove(clone, "away/thesis.tex"),
        lambda: inside.make_folders(clone, "away/x"),
        lambda: inside.second_name(clone, "notes.txt", "away/notes.txt"),
    ):
        with pytest.raises(CheckpointError, match="away is a link"):
            change()
    assert sorted(os.listdir(victim)) == ["startup", "thesis.tex"]


def test_a_folder_that_others_write_to_leads_nowhere_else(tmp_path: Path) -> None:
    root, other = tmp_path / "run", tmp_path / "other"
    (root / "logs" / "first").mkdir(parents=True)
    other.mkdir()
    inside.check_stays(root, "not there")
    (root / "logs" / "latest").symlink_to("first")
    (tmp_path / "alias").symlink_to(root)
    inside.check_stays(root, "logs")
    inside.check_stays(tmp_path / "alias", "logs")
    (root / "logs" / "file").symlink_to(other / "file")
    with pytest.raises(CheckpointError, match=r"logs/file is a link that leads out of .*run, and nothing is written"):
        inside.check_stays(root, "logs")
    (root / "away").symlink_to(other)
    with pytest.raises(CheckpointError, match="away is a link that leads out of"):
        inside.check_stays(root, "away")


def test_what_is_no_plain_file_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening some devices does something: a tape is rewound."""
    os.mkfifo(tmp_path / "pipe")
    opened: list[object] = []
    monkeypatch.setattr(os, "open", lambda path, *rest, **options: opened.append(path))
    with pytest.raises(CheckpointError, match="not a plain file"):
        inside.open_file(tmp_path / "pipe")
    assert opened == []


def test_a_trusted_file_may_have_other_names_and_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    os.link(tmp_path / "file", tmp_path / "second")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "second", "link"):
        with open(inside.open_file(tmp_path / name), "rb") as file:
            assert file.read() == b"content"


def test_the_second_name_of_a_link_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "goal").write_text("content")
    (tmp_path / "link").symlink_to("goal")
    inside.second_name(tmp_path, "link", "other")
    assert os.readlink(tmp_path / "other") == "goal"


def test_a_folder_is_not_made_through_a_link_or_a_file(tmp_path: Path, victim: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(victim)
    (root / "file").touch()
    for name, error in (("link", CheckpointError), ("new/../link", Exception), ("file", OSError)):
        with pytest.raises(error):
            inside.make_folders(root, name)
    assert sorted(os.listdir(root)) == ["file", "link"]
    assert inside.make_folders(root, "a/b") == [root / "a", root / "a" / "b"]
    assert inside.make_folders(root, "a/b") == []


@pytest.mark.parametrize(("length", "shown"), [(160, 160), (161, 161), (10_000, 161)])
def test_of_a_long_path_the_two_ends_are_shown(length: int, shown: int) -> None:
    found = inside.shown(f"a{'x' * (length - 2)}b")
    assert (len(found), found[0], found[-1], "…" in found) == (shown, "a", "b", length > 160)
