"""A read that fails, wherever it is: the message names the cause, and model and disk are as before."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import nbpeft
from nbpeft.errors import NbpeftError
from nbpeft.session import Session
from nbpeft.training.data.files import read_file
from nbpeft.training.disk.checkpoints import _checked, last_whole
from tests.char_tokenizer import CharTokenizer
from tests.effort import drawn as drawn_of
from tests.faults.killing import drawn
from tests.fuzz.corpus import READS
from tests.runs.killed import LORA, adapted_session, rows, session_in, when_noted
from tests.tiny_models import llama, same_state, state

CALLS = ("open", "stat", "lstat", "listdir", "scandir", "fstat", "read", "preadv")
DENIED = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
CODES = (errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE)


class Reads:
    """An open file of which each call of a method may fail."""

    def __init__(self, file: Any, begins: Callable[[str], None]) -> None:
        self._file, self._begins = file, begins

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        if name in ("read", "readline", "readinto", "seek"):
            self._begins(name)
        return found

    def __enter__(self) -> Reads:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        self._begins("read")
        return iter(self._file)


@contextmanager
def failing_read(number: int, code: int, root: Path) -> Iterator[list[str]]:
    """Lets the n-th call that reads something below a folder fail once; gives the calls as they come."""
    calls: list[str] = []
    handles: set[int] = set()

    def begins(name: str, path: str | None = None) -> None:
        calls.append(name)
        if len(calls) == number:
            raise OSError(code, os.strerror(code), path)

    def is_below(thing: Any) -> bool:
        if isinstance(thing, int):
            return thing in handles
        return isinstance(thing, str | os.PathLike) and os.fspath(thing).startswith(str(root))

    def called(name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        below = (args and is_below(args[0])) or is_below(kwargs.get("dir_fd"))
        if below:
            begins(name, None if isinstance(args[0], int) else os.fspath(args[0]))
        result = original(*args, **kwargs)
        if below and name == "open":
            handles.add(result)
        return result

    def opened(original: Any, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not is_below(file) or "r" not in mode or "+" in mode:
            return original(file, mode, *args, **kwargs)
        begins("open file", None if isinstance(file, int) else os.fspath(file))
        return Reads(original(file, mode, *args, **kwargs), begins)

    with pytest.MonkeyPatch.context() as patch:
        for name in (name for name in CALLS if hasattr(os, name)):
            patch.setattr(os, name, partial(called, name, getattr(os, name)))
        for module in (builtins, io):
            patch.setattr(module, "open", partial(opened, module.open))
        yield calls


def refused(act: Callable[[], object], number: int, code: int, root: Path) -> bool:
    """Whether an act is refused because a call fails; the message must say so in one line."""
    try:
        with failing_read(number, code, root):
            act()
    except NbpeftError as error:
        assert "\n" not in str(error) and os.strerror(code) in str(error), str(error)
        return True
    return False


@contextmanager
def seen(root: Path) -> Iterator[set[Path]]:
    """Gives the paths below a folder whose status is asked for in the block, and that are there."""
    asked: set[Path] = set()

    def noted(original: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(path, *args, **kwargs)
        if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(root):
            asked.add(Path(path))
        return result

    with pytest.MonkeyPatch.context() as patch:
        for name in ("stat", "lstat"):
            patch.setattr(os, name, partial(noted, getattr(os, name)))
        yield asked


@contextmanager
def unseen(path: Path, calls: Sequence[str], as_in_3_14: bool) -> Iterator[None]:
    """Lets calls of ``os`` fail for one path; ``Path.exists`` and others then say no, as since Python 3.14."""

    def failing(original: Any, asked: Any = ".", *args: Any, **kwargs: Any) -> Any:
        if isinstance(asked, str | os.PathLike) and Path(asked) == path:
            raise PermissionError(DENIED.errno, DENIED.strerror, os.fspath(asked))
        return original(asked, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, partial(failing, getattr(os, name)))
        for name in ("is_file", "is_dir", "exists") if as_in_3_14 else ():
            patch.setattr(Path, name, getattr(os.path, name.replace("_", "")))
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the states of step 0 and of step 3, at which it was stopped."""
    place = tmp_path_factory.mktemp("stopped")
    session, model = adapted_session(place)
    session.on_run(lambda run, name: when_noted(run, 3, run.control.request_stop))
    session.train(model, rows(), max_steps=4)
    return place


def test_a_run_is_resumed_or_refused_when_a_read_fails(stopped: Path, tmp_path: Path) -> None:
    """It is never resumed from an earlier state, which would then replace the one that could not be read."""
    home = tmp_path / "runs"

    def resume() -> None:
        assert session_in(home).resume("sql-1", model=base, variable="model", data=rows()).step == 3

    shutil.copytree(stopped, home)
    base: Any = llama()
    with failing_read(0, 0, home) as calls:
        resume()
    before, points = state(llama()), sorted({*drawn(len(calls), full=60), *READS["resume"]})
    for number in points:
        shutil.rmtree(home)
        shutil.copytree(stopped, home)
        base, files = llama(), contents(home)
        if refused(resume, number, CODES[number % len(CODES)], home):
            assert same_state(state(base), before) and not hasattr(base, "peft_config")
            assert contents(home) == files


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "rng_state.pth", "trainer_state.json", "sql/adapter_model.safetensors"]
)
def test_a_state_that_cannot_be_read_is_not_passed_over(name: str, stopped: Path) -> None:
    """A library that meets the error says that the file is damaged."""
    place = stopped / "sql-1"

    def failing(original: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, str | os.PathLike) and os.fspath(file) == str(place / "checkpoint-3" / name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(file))
        return original(file, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for module in (builtins, io, os):
            patch.setattr(module, "open", partial(failing, module.open))
        with pytest.raises(NbpeftError, match=rf"{Path(name).name} cannot be read: {os.strerror(errno.EIO)}"):
            last_whole(place)
    assert last_whole(place).name == "checkpoint-3"


@pytest.mark.parametrize(
    ("call", "path"),
    [
        ("listdir", ""),
        ("stat", "checkpoint-3"),
        ("listdir", "checkpoint-3"),
        ("stat", "checkpoint-3/sql"),
        ("stat", "checkpoint-3/trainer_state.json"),
    ],
)
@pytest.mark.parametrize("as_in_3_14", [False, True])
def test_a_state_that_cannot_be_seen_is_not_passed_over(call: str, path: str, as_in_3_14: bool, stopped: Path) -> None:
    """Neither is it for ``Path.glob``, ``os.path.isdir`` and, since Python 3.14, ``Path.is_file``: they see nothing."""
    place = stopped / "sql-1"
    calls, said = (
        [call, *["scandir"] * (call == "listdir")],
        f"{Path(path or place).name} cannot be read: {DENIED.strerror}",
    )
    with unseen(place / path, calls, as_in_3_14), pytest.raises(NbpeftError, match=said):
        last_whole(place)
    assert last_whole(place).name == "checkpoint-3"


ACTS: dict[str, Callable[[Path], Any]] = {
    "load": lambda home: state(nbpeft.PeftModel.from_pretrained(llama(), home / "saved")),
    "save beside": lambda home: Session().save(home / "saved", model=adapted(r=2)),
    "save again": lambda home: bool(Session().save(home / "saved", model=adapted())),
    "merge": lambda home: Session().merge(to=home / "merged", model=adapted()),
    "resume": lambda home: session_in(home).resume("sql-1", model=llama(), variable="model", data=rows()).step,
    "continue a script": lambda home: nbpeft.training.unfinished_run(home)["resume_from_checkpoint"],
    "read rows": lambda home: read_file(home / "rows.jsonl"),
}


def adapted(**fields: Any) -> Any:
    return nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(target_modules=["q_proj"], **fields), "sql")


def outcome(act: Callable[[Path], Any], home: Path) -> Any:
    """The value of an act, or the error that refuses it in one line: ``DENIED`` if it says so."""
    try:
        return act(home)
    except NbpeftError as error:
        assert "\n" not in str(error)
        return DENIED if DENIED.strerror in str(error) else type(error)


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("as_in_3_14", [False, True])
def test_a_place_that_cannot_be_seen_is_not_taken_for_absent(
    name: str, as_in_3_14: bool, stopped: Path, tmp_path: Path
) -> None:
    """The command is refused in one line that says so, or does the same as ever."""
    kept, home = tmp_path / "kept", tmp_path / "home"
    shutil.copytree(stopped, kept)
    Session().save(kept / "saved", model=adapted())
    Session().merge(to=kept / "merged", model=adapted())
    (kept / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    shutil.copytree(kept, home)
    with seen(home) as asked:
        usual = outcome(ACTS[name], home)
    assert usual is not DENIED and asked
    before, after = contents(kept), contents(home)
    for path in drawn_of(sorted(asked), quick=6):
        shutil.rmtree(home)
        shutil.copytree(kept, home)
        with unseen(path, ("stat", "lstat"), as_in_3_14):
            found = outcome(ACTS[name], home)
        assert found is DENIED or same_state(found, usual), path
        if name != "resume":  # which notes the time
            assert contents(home) == before if found is DENIED else contents(home).keys() == after.keys(), path


def test_a_named_state_is_resumed_from_where_its_siblings_cannot_be_seen(stopped: Path, tmp_path: Path) -> None:
    """They are needed for a hint alone."""
    place = tmp_path / "sql-1"
    shutil.copytree(stopped / "sql-1", place)

    def failing(original: Any, asked: Any = ".") -> Any:
        if Path(asked) == place:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(asked))
        return original(asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "listdir", partial(failing, os.listdir))
        assert _checked(place / "checkpoint-3") == place / "checkpoint-3"
        (place / "checkpoint-3" / "trainer_state.json").unlink()
        with pytest.raises(NbpeftError, match=r"cannot be resumed from \(no trainer_state.json\)$"):
            _checked(place / "checkpoint-3")
    with pytest.raises(NbpeftError, match=r"; .*checkpoint-0 is complete$"):
        _checked(place / "checkpoint-3")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_rows_that_cannot_be_read_change_no_model(suffix: str, tmp_path: Path) -> None:
    texts = [{"prompt": f"q{number}", "completion": "ab"} for number in range(4)]
    lines = {"jsonl": "\n".join(map(json.dumps, texts)), "json": json.dumps(texts)}
    lines["csv"] = "\n".join(["prompt,completion", *(f"{row['prompt']},{row['completion']}" for row in texts)])
    file = tmp_path / f"rows.{suffix}"
    file.write_text(lines[suffix])
    model = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(**LORA))

    def train() -> None:
        nbpeft.train(model, str(file), tokenizer=CharTokenizer(), max_steps=1)

    with failing_read(0, 0, tmp_path) as calls:
        train()
    before = state(model)
    found = [refused(train, number, CODES[number % len(CODES)], tmp_path) for number in range(3, len(calls) + 1)]
    assert any(found)
    if all(found):
        assert same_state(state(model), before)
