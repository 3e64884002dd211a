"""Folders of runs: names, locks, what is read back, and what becomes of old ones."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from nbpeft.checkpoint.staging import probe_lock
from nbpeft.errors import CheckpointError, CheckpointNotFoundError
from nbpeft.runs.folder import RunFolder
from nbpeft.runs.record import differing
from nbpeft.runs.store import RunPlace, RunStore
from tests.faults.killing import die, forked


def made(store: RunStore, adapter: str = "sql", *, status: str = "finished", started: float = 0.0, **more: Any) -> str:
    """A run that has ended, or whose process has; its id is its first name."""
    folder = store.create(adapter)
    folder.write({"id": folder.name, "adapter": adapter, "status": status, "started": started, **more})
    folder.close()
    return folder.name


def with_state(store: RunStore, name: str, byte_count: int, step: int = 3) -> str:
    state = store.place / name / f"checkpoint-{step}"
    state.mkdir()
    (state / "optimizer.pt").write_bytes(b"x" * byte_count)
    return name


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


def test_names_count_up_and_are_never_given_twice(store: RunStore) -> None:
    assert [made(store, name) for name in ("sql", "sql", "a, b", "sql")] == ["sql-1", "sql-2", "a+b-1", "sql-3"]
    store.delete("sql-2")
    assert made(store) == "sql-4"
    assert made(store, "../x y/") == "x+y-1"


def test_the_folders_are_private(store: RunStore) -> None:
    made(store)
    assert stat.S_IMODE(os.stat(store.place).st_mode) == stat.S_IMODE(os.stat(store.place / "sql-1").st_mode) == 0o700
    assert (store.place / ".gitignore").read_text() == "*\n"


def test_processes_that_make_runs_at_once_get_different_ones(store: RunStore, tmp_path: Path) -> None:
    parts = [tmp_path / f"names-{number}" for number in range(4)]
    children = []
    for part in parts:
        child = os.fork()
        if child == 0:
            try:
                part.write_text("\n".join(made(store) for _ in range(15)))
            finally:
                os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    names = [name for part in parts for name in part.read_text().split()]
    assert sorted(names) == sorted({f"sql-{number}" for number in range(1, 61)})


def test_a_run_whose_process_died_has_crashed(store: RunStore) -> None:
    def act() -> None:
        store.create("sql").write({"adapter": "sql", "status": "running", "step": 7})
        die()

    assert forked(act)
    (record,) = store.records()
    assert (record.name, record.status, record.step) == ("sql-1", "crashed", 7)


def test_a_run_that_has_not_ended_is_where_its_curve_is(store: RunStore) -> None:
    folder = store.create("sql")
    folder.write({"adapter": "sql", "status": "running", "step": 7, "loss": 2.0, "seconds": 1.5})
    for entry in ({"step": 8, "loss": 1.25, "seconds": 2.5}, {"step": 8, "eval_loss": 9.0, "seconds": 3.0}):
        folder.append(entry)
    with open(folder.path / "curve.jsonl", "a", encoding="utf-8") as curve:
        curve.write('{"step": 9, "lo')
    (record,) = store.records()
    assert (record.status, record.step, record.loss, record.seconds) == ("running", 8, 1.25, 2.5)
    folder.write({"adapter": "sql", "status": "stopped", "step": 7, "loss": 2.0})
    assert [record.step for record in store.records()] == [7]
    folder.close()


def test_how_a_run_ended_is_recorded_on_a_full_disk(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.create("sql")
    folder.write({"adapter": "sql", "status": "running", "step": 7, "targets": ["q_proj"] * 9})
    folder.append({"step": 8})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="space"):
        folder.write({"adapter": "sql", "status": "running", "step": 8})
    folder.end({"status": "finished", "step": 8})
    assert [(record.status, record.step) for record in store.records()] == [("finished", 8)]
    folder.close()


def test_a_run_that_is_written_is_running_for_everybody(store: RunStore) -> None:
    folder = store.create("sql")
    folder.write({"adapter": "sql", "status": "running"})
    assert [record.status for record in store.records()] == ["running"]
    for act in (lambda: store.delete("sql-1"), lambda: store.rename("sql-1", "best"), RunFolder(folder.path).open):
        with pytest.raises(CheckpointError, match="run sql-1 is still running"):
            act()
    folder.close()
    store.delete("sql-1")
    assert os.listdir(store.place) == [".gitignore"]


def test_who_only_asks_whether_a_run_is_running_is_no_training(store: RunStore) -> None:
    name = made(store, status="running")
    probe = probe_lock(store.place / name)
    assert probe is not None
    assert store.find(name).record().status == "crashed"
    asked = threading.Timer(0.05, os.close, [probe])
    asked.start()
    training = store.find(name)
    training.open()  # waits until nobody asks
    asked.join()
    assert store.find(name).record().status == "running"
    with pytest.raises(CheckpointError, match="still running"):
        store.find(name).open()
    training.close()


def test_renaming(store: RunStore) -> None:
    made(store), made(store)
    store.rename("sql-1", "best.of-all")
    assert sorted(record.name for record in store.records()) == ["best.of-all", "sql-2"]
    for new, told in (
        ("sql-2", "a run called 'sql-2' already exists"),
        ("a/b", "cannot be"),
        ("", "cannot be"),
        ("..", "cannot be"),
    ):
        with pytest.raises(CheckpointError, match=told):
            store.rename("best.of-all", new)
    with pytest.raises(CheckpointNotFoundError, match=r"no run is called 'sql-3' in .*Did you mean 'sql-2'"):
        store.rename("sql-3", "x")


def test_a_name_that_another_run_has_by_now_is_refused(store: RunStore, tmp_path: Path) -> None:
    former = store.find(made(store, id="former")).record()
    store.rename("sql-1", "best", former.id)
    made(store, id="new")
    before = store.find("sql-1").record()
    told = "^the list is out of date: sql-1 is another run now; list the runs again$"
    for act in (
        lambda: store.delete("sql-1", former.id),
        lambda: store.rename("sql-1", "x", former.id),
        lambda: store.note("sql-1", "x", former.id),
    ):
        with pytest.raises(CheckpointError, match=told):
            act()
    store.mark_saved(former.id, "sql", tmp_path)
    assert store.find("sql-1").record() == before
    renamed = store.with_id(former.id)
    assert renamed is not None and renamed.name == "best" and renamed.record().saved == {"sql": str(tmp_path)}
    store.delete("best", former.id)
    assert store.with_id(former.id) is None
    store.mark_saved(former.id, "sql", tmp_path)
    assert store.records() == [before]


def test_a_run_that_cannot_be_read_is_deleted_as_it_was_listed(store: RunStore) -> None:
    (store.place / made(store) / "run.json").write_text("{")
    (record,) = store.records()
    assert (record.status, record.id) == ("unreadable", "")
    store.delete(record.name, record.id)
    assert store.records() == []


def test_a_note_stays_with_its_run(store: RunStore) -> None:
    made(store, loss=0.5), made(store)
    store.note("sql-1", "before the\n schema\x1b[2J changed")
    store.rename("sql-1", "best")
    before = store.find("best").record()
    assert before.note == "before the schema [2J changed" and before.loss == 0.5
    with pytest.raises(CheckpointError, match="at most 1,000 characters, and this one 1,001"):
        store.note("best", "x" * 1001)
    assert store.find("best").record() == before
    store.note("best", " ")
    assert store.find("best").record().note == ""
    running = store.create("kind")
    running.write({"adapter": "kind", "status": "running"})
    with pytest.raises(CheckpointError, match="run kind-1 is still running"):
        store.note("kind-1", "x")
    running.close()
    facts = json.loads((store.place / "sql-2" / "run.json").read_text())
    (store.place / "sql-2" / "run.json").write_text(json.dumps({**facts, "note": 3}))
    assert "note in run.json is 3, not a string" in store.find("sql-2").record().message
    with pytest.raises(CheckpointError, match=r"note in run\.json is 3"):
        store.note("sql-2", "x")


def test_words_are_found_in_each_field_of_a_run(store: RunStore) -> None:
    name = made(store, model="base", note="Straße", settings={"r": 8, "method": "LoRA"})
    record = store.find(name).record()
    assert all(map(record.matches, ("", "SQL-1 base", "strasse", "r 8", "lora finished")))
    assert not any(map(record.matches, ("sql-2", "lora crashed", "16")))


@pytest.mark.parametrize("name", ["../outside", ".", "", "/etc"])
def test_what_is_no_run_is_never_deleted(store: RunStore, name: str) -> None:
    made(store)
    outside = store.place.parent / "outside"
    outside.mkdir()
    (outside / "run.json").write_text("{}")
    with pytest.raises(CheckpointNotFoundError):
        store.delete(name)
    assert (outside / "run.json").exists() and len(store.records()) == 1


def test_the_curve_is_readable_line_by_line(store: RunStore) -> None:
    folder = store.create("sql")
    for step in (1, 2, 3):
        folder.append({"step": step, "loss": float("nan") if step == 2 else 1.0 / step})
    with open(folder.path / "curve.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # what a killed process leaves
    assert [entry["loss"] for entry in folder.entries()] == [1.0, None, 1 / 3]
    assert [entry["step"] for entry in folder.cut_after(2)] == [1, 2]
    assert [json.loads(line)["step"] for line in (folder.path / "curve.jsonl").read_text().splitlines()] == [1, 2]


def test_no_token_is_written(store: RunStore) -> None:
    token = "hf_" + "aB3d" * 8
    folder = store.create("sql")
    folder.write({"adapter": "sql", "status": "running", "message": f"denied to {token}"}, samples=[{"prompt": token}])
    folder.append({"step": 1, "note": token})
    name = made(store)
    store.note(name, f"pushed with {token}")
    assert store.find(name).record().note == "pushed with ***"
    assert token not in "".join(path.read_text() for path in store.place.rglob("*.json*"))


def test_old_runs_go_and_the_newest_and_running_stay(store: RunStore) -> None:
    for number in range(5):
        made(store, started=number, status="crashed" if number == 0 else "finished")
    running = store.create("sql")
    running.write({"adapter": "sql", "status": "running", "started": 0.5})
    store.tidy(most_runs=3)
    assert sorted(record.name for record in store.records()) == ["sql-1", "sql-5", "sql-6"]


def saved(store: RunStore, name: str) -> None:
    """Saves the adapter of a run elsewhere."""
    folder = store.place.parent / f"saved-{name}"
    folder.mkdir()
    write_adapter(folder)
    store.mark_saved(name, "sql", folder)


def write_adapter(folder: Path, content: bytes = b"x", time: int = 10**18) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    os.utime(folder / "adapter_model.safetensors", ns=(time, time))


def kept_steps(store: RunStore) -> dict[str, tuple[int, ...]]:
    return {record.name: record.kept_steps for record in store.records()}


def test_old_states_go_and_their_curves_stay(store: RunStore) -> None:
    for number in range(3):
        saved(store, with_state(store, made(store, started=number), 4000))
    assert store.tidy(most_bytes=9000) == [
        "runs took more than 9e-06 GB: deleted checkpoints of 'sql-1', not their curves"
    ]
    assert kept_steps(store) == {"sql-1": (), "sql-2": (3,), "sql-3": (3,)}
    reported = store.tidy(most_bytes=1)
    assert "checkpoints of 'sql-2'" in reported[0] and len(reported) == 2
    assert kept_steps(store) == {"sql-1": (), "sql-2": (), "sql-3": (3,)}
    assert store.tidy(most_bytes=10**6) == []


def test_what_was_never_saved_elsewhere_stays(store: RunStore) -> None:
    """Its last state; and a run whose copy is gone again counts as not saved."""
    for number in range(4):
        name = with_state(store, with_state(store, made(store, started=number), 4000), 4000, step=1)
        if number in (1, 2):
            saved(store, name)
    shutil.rmtree(store.place.parent / "saved-sql-3")
    reported = store.tidy(most_runs=1, most_bytes=1)
    assert kept_steps(store) == {"sql-1": (3,), "sql-3": (3,), "sql-4": (3, 1)}
    assert reported[0] == "more than 1 runs were kept: deleted 'sql-2'"
    assert "deleted checkpoints of 'sql-1', 'sql-3', not their curves" in reported[1]
    assert "saved nowhere else: save them, or delete runs that are not needed" in reported[2]


@pytest.mark.parametrize("change", [{"content": b"xy"}, {"time": 10**18 + 1}])
def test_a_copy_that_another_adapter_took_the_place_of_is_none(store: RunStore, change: dict[str, Any]) -> None:
    for number in range(2):
        name = with_state(store, made(store, started=number), 4000)
    saved(store, "sql-1")
    write_adapter(store.place.parent / "saved-sql-1", **change)
    store.tidy(most_runs=1, most_bytes=0)
    assert kept_steps(store) == {"sql-1": (3,), name: (3,)}
    store.mark_saved("sql-1", "sql", store.place.parent / "saved-sql-1")
    store.tidy(most_bytes=0)
    assert kept_steps(store) == {"sql-1": (), name: (3,)}


def test_a_copy_of_which_nothing_but_its_folder_is_known_is_none(store: RunStore) -> None:
    for number in range(2):
        with_state(store, made(store, started=number), 4000)
    saved(store, "sql-1")
    folder = store.find("sql-1")
    folder.write({name: value for name, value in folder.facts().items() if name != "saved_files"})
    store.tidy(most_bytes=0)
    assert kept_steps(store)["sql-1"] == (3,)


def test_a_run_of_several_adapters_is_saved_when_all_are(store: RunStore, tmp_path: Path) -> None:
    name = with_state(store, made(store, adapter="a, b", adapters=["a", "b"]), 4000)
    made(store, started=1.0)
    write_adapter(tmp_path)
    for adapter, left in (("a", (3,)), ("unknown", (3,)), ("b", ())):
        store.mark_saved(name, adapter, tmp_path)
        store.tidy(most_bytes=1)
        assert kept_steps(store)[name] == left
    store.mark_saved("none", "a", tmp_path)  # never an error: the adapter is saved


def test_an_adapter_may_have_a_comma_in_its_name(store: RunStore, tmp_path: Path) -> None:
    name = with_state(store, made(store, adapter="a, b", adapters=["a, b"]), 4000)
    made(store, started=1.0)
    write_adapter(tmp_path)
    store.mark_saved(name, "a, b", tmp_path)
    record = store.find(name).record()
    assert record.adapters == ("a, b",) and record.saved == {"a, b": str(tmp_path)}
    store.tidy(most_bytes=1)
    assert kept_steps(store)[name] == ()


def test_which_settings_differ(store: RunStore) -> None:
    made(store, settings={"r": 8, "seed": 1}), made(store, settings={"r": 16, "seed": 1, "optim": "sgd"})
    first, second = sorted(store.records(), key=lambda record: record.name)
    assert differing([first, second]) == {"r": (8, 16), "optim": (None, "sgd")}


def test_a_place_is_a_folder_or_says_more(tmp_path: Path) -> None:
    assert RunPlace.of(str(tmp_path)) == RunPlace(RunStore(tmp_path))
    assert RunPlace.of(RunPlace(RunStore(tmp_path), "sql-1")).name == "sql-1"
