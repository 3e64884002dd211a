"""Run folders of strangers: each is listed or named, all others are shown, and no training is kept from its end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbpeft.errors import NbpeftError
from nbpeft.runs.folder import LARGEST
from nbpeft.runs.record import UNREADABLE
from nbpeft.runs.store import RunStore
from nbpeft.session import Session
from tests.effort import effort
from tests.fuzz.corpus import VALUES

COUNT = effort(quick=300, full=1_000, long=20_000)
SECONDS = 20

FACTS: dict[str, Any] = {
    **{"version": 1, "adapter": "sql", "model": "model", "started": time.time(), "status": "finished", "step": 3},
    **{"total_steps": 3, "first_step": 0, "loss": 1.5, "eval_loss": 2.0, "best_loss": 2.0, "best_step": 3},
    **{"seconds": 1.5, "message": "", "metrics": {"x": 1.0}, "settings": {"r": 4, "seed": 1}, "process": 4},
    **{"host": "here", "arguments": {"max_steps": 3}, "objects": [], "secrets": [], "data": {"rows": 3}},
    **{"source": {"line": "model"}, "resumed": [1], "saved": {"sql": "/nowhere"}, "updated": 3.0},
}
CURVE = "".join(json.dumps({"step": step, "loss": 1.0, "seconds": 0.5 * step}) + "\n" for step in (1, 2, 3))


def text_of(facts: dict[str, Any], name: str, value: str) -> str:
    """A ``run.json`` with a value that ``json.dumps`` could not write."""
    return json.dumps({**facts, name: "@"}).replace('"@"', value)


def write(folder: Path, text: str | bytes = json.dumps(FACTS), curve: str | bytes | None = CURVE) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    if curve is not None:
        (folder / "curve.jsonl").write_bytes(curve if isinstance(curve, bytes) else curve.encode())
    (folder / "checkpoint-3").mkdir()


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A place with a run of one's own, in a folder with something that nobody may touch."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.tex").write_text("years of work")
    write(tmp_path / "runs" / "own-1")
    return RunStore(tmp_path / "runs")


@pytest.fixture(autouse=True)
def stopped_when_it_hangs() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def check(store: RunStore, count: int = 1) -> dict[str, str]:
    """Does all that reads or clears run folders; returns the status of each strange one."""
    session = Session()
    session.context.chosen_runs_folder = str(store.place)
    found = session.runs()
    statuses = {record.name: record.status for record in found.records}
    assert statuses.pop("own-1") == "finished"
    assert len(statuses) == count, "each is listed or named"
    assert all(record.message for record in found.records if record.status == UNREADABLE)
    for shown in (str(found), found._repr_html_()):
        shown.encode()
        assert len(shown) < 400_000 and "\x1b" not in shown
    assert "<script>" not in found._repr_html_()
    for sort in ("result", "name", "steps", "seconds", "best"):
        session.runs(sort=sort)
    found.to_dataframe()
    for name in list(statuses)[:: 1 if count == 1 else 3]:
        for command in (
            lambda name=name: session.runs("own-1", name),
            lambda name=name: session.resume(name, data=[]),
        ):
            try:
                command()
            except NbpeftError as error:
                assert len(str(error)) <= 520 and "\n" not in str(error)
    for limits in ({}, {"most_bytes": 1}, *([{"most_runs": 1}] if count == 1 else [])):
        assert all(len(note) < 400 for note in store.tidy(**limits))
    if count == 1:
        for name in set(session.run_names()) - {"own-1"}:
            session.delete_run(name)
        assert session.run_names() == ("own-1",)
    victim = store.place.parent / "victim"
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"thesis.tex": "years of work"}
    return statuses


@pytest.mark.drawn(8)
@pytest.mark.parametrize("name", FACTS)
def test_no_value_of_a_field_keeps_the_others_from_being_shown(name: str, store: RunStore) -> None:
    for number, value in enumerate(VALUES):
        write(store.place / f"strange-{number}", text_of(FACTS, name, value))
    check(store, len(VALUES))


@pytest.mark.drawn(3)
@pytest.mark.parametrize("status", ["running", "finished"])
@pytest.mark.parametrize("name", ["step", "loss", "seconds", "eval_loss", "x"])
def test_no_line_of_a_curve_does(name: str, status: str, store: RunStore) -> None:
    for number, value in enumerate(VALUES):
        line = text_of({"step": 4, "loss": 1.0, "seconds": 9.0}, name, value)
        write(store.place / f"strange-{number}", json.dumps({**FACTS, "status": status}), f"{CURVE}{line}\n")
    check(store, len(VALUES))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def link(path: Path) -> None:
    path.symlink_to(path.parent.parent.parent / "victim" / "thesis.tex")


def loop(path: Path) -> None:
    path.symlink_to(path)


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def second_name(path: Path) -> None:
    os.link(path.parent.parent.parent / "victim" / "thesis.tex", path)


@pytest.mark.drawn(20)
@pytest.mark.parametrize("kind", [pipe, endless, folder, link, loop, huge, second_name])
@pytest.mark.parametrize("name", LARGEST)
@pytest.mark.parametrize("status", ["running", "finished"])
def test_no_kind_of_file_does(name: str, kind: Callable[[Path], None], status: str, store: RunStore) -> None:
    write(store.place / "strange-1", json.dumps({**FACTS, "status": status}))
    (store.place / "strange-1" / name).unlink(missing_ok=True)
    kind(store.place / "strange-1" / name)
    seen = check(store)
    assert name != "run.json" or seen == {"strange-1": UNREADABLE}


def test_a_run_that_is_a_link_is_named_and_only_the_link_is_deleted(store: RunStore) -> None:
    write(store.place.parent / "elsewhere")
    (store.place / "strange-1").symlink_to(store.place.parent / "elsewhere")
    assert check(store) == {"strange-1": UNREADABLE}
    assert len(os.listdir(store.place.parent / "elsewhere")) == 3


def test_states_that_are_links_are_none(store: RunStore) -> None:
    write(store.place / "strange-1")
    for step in ("4", "5", "007", "9" * 200, "x", "-1"):
        (store.place / "strange-1" / f"checkpoint-{step}").symlink_to(store.place.parent / "victim")
    record = next(record for record in store.records() if record.name == "strange-1")
    assert record.kept_steps == (3,)
    check(store)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"\x1b[31m", b"x" * 250, "é😀".encode(), b"-rf"])
def test_no_name_does(name: bytes, store: RunStore) -> None:
    write(store.place / os.fsdecode(name))
    check(store)


def test_drawn_damage_does_neither(store: RunStore) -> None:
    base = json.dumps(FACTS).encode()
    for seed in range(COUNT):
        draw = random.Random(seed)
        data = bytearray(base)
        for _ in range(draw.choice((1, 1, 3, 20))):
            place = draw.randrange(len(data))
            kind = draw.randrange(3)
            if kind == 0:
                data[place] = draw.randrange(256)
            elif kind == 1:
                del data[place : place + draw.randrange(1, 9)]
            else:
                data[place:place] = draw.choice((b"9" * 30, b"e999", b'"', b"{", b"null", b"-", b"\\ud800", b"\xff"))
        curve = bytearray(CURVE.encode())
        curve[draw.randrange(len(curve))] = draw.randrange(256)
        write(store.place / "strange-1", bytes(data), bytes(curve))
        try:
            names = {record.name: record for record in store.records()}
            assert names["own-1"].status == "finished" and "strange-1" in names
            store.tidy(most_bytes=1)
            repr(names["strange-1"]).encode()
            store.find("strange-1").entries()
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
        shutil.rmtree(store.place / "strange-1")
