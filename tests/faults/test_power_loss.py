"""A loss of power during a write leaves the state before it or the one after it, in whatever order the disk wrote.

``python3 tests/run.py --long -n 0 -s tests/faults/test_power_loss.py`` tries all states and prints how many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nbpeft import checkpoint
from nbpeft.checkpoint import read_checkpoint, staging
from nbpeft.checkpoint.atomic import NewFile, replace_files
from nbpeft.checkpoint.model_files import ModelFolder
from nbpeft.errors import CheckpointError, NbpeftError
from nbpeft.model.saving.files import push
from nbpeft.runs.store import RunStore
from nbpeft.shipping import ship
from nbpeft.training.disk.checkpoints import drop_after, last_whole, put_checkpoint
from tests.effort import effort
from tests.faults.power import Recording, State, lay_out, recorded
from tests.faults.writers import NEW, OLD, Models, script_in, writers
from tests.shipping import support

MOMENTS, STATES = effort(quick=8, full=12, long=10**6), effort(quick=12, full=40, long=10**6)
ORDERS, TEARS = effort(quick=2, full=4, long=12), effort(quick=1, full=1, long=2)

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="simulates a POSIX file system"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@dataclass(frozen=True)
class Operation:
    """A command that writes.

    Attributes:
        begin: makes the state before it.
        act: the command.
        read: what is read back, by name; a part of it is complete for itself.
        finish: whether the next write finishes what was begun.
        shown: whether other programs than nbpeft, which do not know staging folders, read one state too; otherwise
            that is so once the next write has cleared up.
    """

    begin: Callable[[Path], object]
    act: Callable[[Path], object]
    read: Callable[[Path], dict[str, Any]]
    finish: bool = True
    shown: bool = True


def contents(home: Path) -> dict[str, Any]:
    """The files of each folder in a folder, without the remains of interrupted writes."""
    found: dict[str, Any] = {}
    for path in sorted(home.rglob("*")):
        parts = path.relative_to(home).parts
        if path.is_file() and not any(part.startswith(staging.STAGING_PREFIX) for part in parts):
            found.setdefault(parts[0], {})["/".join(parts[1:])] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def adapters_in(home: Path) -> dict[str, Any]:
    """Config and tensors of each adapter in ``home/target``."""
    found = {}
    for path in sorted((home / "target").rglob("adapter_model.safetensors")):
        if staging.STAGING_PREFIX in str(path.relative_to(home)):
            continue
        with contextlib.suppress(CheckpointError):
            saved = read_checkpoint(path.parent)
            tensors = {name: (tuple(value.shape), value.sum().item()) for name, value in saved.tensors.items()}
            found[path.parent.name] = (json.dumps(saved.config.to_dict(), default=str), tensors)
    return found


def model_in(home: Path) -> dict[str, Any]:
    """The tensors and the config of the model in ``home/target``."""
    try:
        model = ModelFolder(home / "target")
    except CheckpointError:
        return {}
    names = [spec.name for shard in model.shards for spec in shard]
    config = (home / "target" / "config.json").read_text()
    return {"model": (config, {name: model.read(name).sum().item() for name in names})}


def runs_in(home: Path) -> dict[str, Any]:
    """All that is shown of each run, and the checkpoint from which it is resumed."""
    store, found = RunStore(home / "runs"), {}
    for record in store.records():
        run = store.find(record.name)
        try:
            place = last_whole(run.path)
            resumed = (place.name, contents(place))
        except CheckpointError:
            resumed = None
        logged = [entry["step"] for entry in run.entries()]
        shown = (record.status, record.step, record.loss, record.kept_steps[:1], resumed, logged)
        found[record.name] = (*shown, run.series(10), run.samples(10))
    return found


# Runs


def trained(home: Path, until: int, *, ends: bool = False, most: int = 1) -> None:
    """A run as a training writes it, up to a step."""
    store = RunStore(home / "runs")
    run = store.create("sql")
    run.write({"adapter": "sql", "status": "running", "started": 1.0, "step": 0, "process": 1, "host": "elsewhere"})
    for step in range(1, until + 1):
        train_on(run, step, most=most)
    if ends:
        run.write(facts_of(until, "finished"), series_of(until), samples_of(until))
    run.close()


def facts_of(step: int, status: str = "running") -> dict[str, Any]:
    return {"adapter": "sql", "status": status, "started": 1.0, "step": step, "loss": 1 / step, "host": "elsewhere"}


def series_of(step: int) -> dict[str, Any]:
    return {"loss": [[number, 1 / number] for number in range(1, step + 1)]}


def samples_of(step: int) -> list[dict[str, Any]]:
    return [{"step": number, "prompt": "p", "text": "t" * number} for number in range(1, step + 1)]


def train_on(run: Any, step: int, *, most: int = 1) -> None:
    run.append({"step": step, "loss": 1 / step, "seconds": 1.0})
    run.write(facts_of(step), series_of(step), samples_of(step))
    put_checkpoint(run.path, step, lambda folder: write_checkpoint_of(folder, step), most=most)


def write_checkpoint_of(folder: Path, step: int) -> None:
    save_file(
        {"base_model.model.q.lora_A.weight": torch.full((2, 2), float(step))}, folder / "adapter_model.safetensors"
    )
    torch.save({"state": step}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))


def with_run(act: Callable[[Any], object]) -> Callable[[Path], None]:
    def on(home: Path) -> None:
        run = RunStore(home / "runs").find("sql-1")
        run.open()
        act(run)
        run.close()

    return on


RUNS: dict[str, Operation] = {
    "run: begin": Operation(lambda home: None, lambda home: trained(home, 0), runs_in),
    "run: record": Operation(
        lambda home: trained(home, 2),
        with_run(lambda run: run.write(facts_of(3), series_of(3), samples_of(3))),
        runs_in,
    ),
    "run: checkpoint": Operation(
        lambda home: trained(home, 2, most=2),
        with_run(lambda run: put_checkpoint(run.path, 3, lambda folder: write_checkpoint_of(folder, 3), most=1)),
        runs_in,
    ),
    "run: same checkpoint": Operation(
        lambda home: trained(home, 2),
        with_run(lambda run: put_checkpoint(run.path, 2, lambda folder: write_checkpoint_of(folder, 7), most=1)),
        runs_in,
    ),
    "run: resume": Operation(lambda home: trained(home, 3, most=3), with_run(lambda run: run.cut_after(2)), runs_in),
    "run: diverged": Operation(
        lambda home: trained(home, 3, most=3), with_run(lambda run: drop_after(run.path, 2)), runs_in
    ),
    "run: restore": Operation(
        lambda home: trained(home, 3),
        with_run(lambda run: run.restore({name: text.replace("0.5", "0.25") for name, text in run.contents().items()})),
        runs_in,
    ),
    "run: rename": Operation(
        lambda home: trained(home, 2), lambda home: RunStore(home / "runs").rename("sql-1", "best"), runs_in
    ),
    "run: delete": Operation(
        lambda home: trained(home, 2), lambda home: RunStore(home / "runs").delete("sql-1"), runs_in
    ),
}


# Everything else


def checkpoints_in(home: Path) -> dict[str, Any]:
    """The checkpoint from which a Trainer resumes."""
    try:
        place = last_whole(home / "target")
    except CheckpointError:
        return {}
    return {"last": (place.name, contents(place))}


def nested(home: Path, text: str) -> None:
    """Files in folders that may be new."""
    replace_files(home / "target", [NewFile.of_text(name, text) for name in ("first", "a/third", "a/b/second")])


def file_of(home: Path) -> None:
    (home / "target").mkdir()
    (home / "target" / "first").write_text("old")


def shipped(home: Path, rank: int, **options: Any) -> None:
    model = support.adapted(support.base_model(), r=rank)
    ship(model, to=home / "target", replace=True, tokenizer=support.tokenizer(), **options)


def pushed(home: Path) -> None:
    model = support.adapted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "push", lambda folder, *_: contents(Path(folder)))
        push(model.manager, "me/adapter")


def merged(home: Path) -> None:
    support.adapted().merge_and_unload()


OTHERS: dict[str, Operation] = {
    "files in folders": Operation(file_of, lambda home: nested(home, "new"), contents, shown=False),
    "files in folders anew": Operation(lambda home: None, lambda home: nested(home, "new"), contents),
    "push": Operation(file_of, pushed, contents),
    "merge for good": Operation(file_of, merged, contents),
    **{
        f"ship: {name}": Operation(
            lambda home, options=options: shipped(home, OLD, **options),  # type: ignore[misc]
            lambda home, options=options: shipped(home, NEW, **options),  # type: ignore[misc]
            contents,
            shown=False,
        )
        for name, options in {
            "adapter": {"engine": "vllm"},
            "adapter as GGUF": {"engine": "llama.cpp"},
            "Modelfile": {"engine": "ollama", "base": "llama3.2:1b"},
            "model": {"engine": "vllm", "merged": True},
            "model as GGUF": {"engine": "llama.cpp", "merged": True, "quantize": "q8_0"},
        }.items()
    },
}
SAVES: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, bool]]] = {
    "save one": (adapters_in, {}),
    "save one anew": (adapters_in, {}),
    "save several": (adapters_in, {}),
    "card": (contents, {}),
    "merge into shards": (model_in, {"finish": False}),
    "merge beside other files": (model_in, {"finish": False}),
    "export": (lambda home: {"script": script_in(home / "target")}, {}),
    "checkpoint": (checkpoints_in, {}),
}


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Operation]:
    written, found = writers(Models(tmp_path_factory.mktemp("models"))), {**RUNS, **OTHERS}
    for name, (read, options) in SAVES.items():
        writer = written[name]
        found[name] = Operation(
            lambda home, writer=writer: writer.write(home / "target", OLD) if writer.begin else None,  # type: ignore[misc]
            lambda home, writer=writer: writer.write(home / "target", NEW),  # type: ignore[misc]
            read,
            **options,
        )
    return found


@pytest.fixture(autouse=True)
def repeatable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names staging folders in every run alike, and so that they are valid where states are laid out."""
    numbers = itertools.count()
    monkeypatch.setattr(staging.secrets, "token_hex", lambda size: f"{next(numbers):0{2 * size}x}")
    monkeypatch.setattr(staging, "_code", lambda parent, token: hashlib.sha256(token.encode()).hexdigest()[:16])


class Torn(Exception):
    """What was read is neither the state before nor the one after."""


def differing(value: Any, wanted: list[Any]) -> str:
    """Which parts of a value are neither as before nor as after."""
    if isinstance(value, tuple) and all(isinstance(one, tuple) and len(one) == len(value) for one in wanted):
        odd = [place for place in range(len(value)) if len({repr(one[place]) for one in (value, *wanted)}) > 1]
        return "; ".join(
            f"{place}: {value[place]!r:.100}, not {[one[place] for one in wanted]!r:.200}" for place in odd
        )
    return f"{value!r:.150}, not {wanted!r:.300}"


@dataclass
class Figures:
    """What one operation came to.

    Attributes:
        calls: how many changes, writes and flushes it makes.
        states: how many different states a loss of power may leave.
        torn: in how many of those that were tried something was wrong.
    """

    calls: int = 0
    states: int = 0
    torn: int = 0


def check(operation: Operation, state: State, root: Path, values: tuple[Any, Any], *, ended: bool) -> None:
    """Reads a state, and reads it again after the next write has cleared up."""
    before, after = values
    lay_out(state, root)
    home = root / "home"
    tempfile.tempdir = str(root / "tmp")
    found = operation.read(home)
    parts = {name: found.get(name) for name in {*found, *before, *after}}
    wanted = [{name: value.get(name) for name in parts} for value in values]
    for name, value in parts.items() if operation.shown else ():
        if not any(value == one[name] for one in wanted):
            raise Torn(f"{name} is {differing(value, [one[name] for one in wanted])}")
    if ended and parts != wanted[1]:
        raise Torn("what was written is lost")
    for folder in [home, *(path for path in home.rglob("*") if path.is_dir())]:
        staging.sweep(folder, finish=operation.finish)
    left = operation.read(home)
    if left not in (before, after):
        raise Torn(f"after the next write: {differing(left, [before, after])}")
    if ended and left != after:
        raise Torn("what was written is lost at the next write")
    if list(home.rglob(f"{staging.STAGING_PREFIX}*")):
        raise Torn("remains are left")


def flawed(operation: Operation, root: Path, seed: str) -> tuple[Figures, dict[str, int]]:
    """Tries states of one operation; returns how many there are, and what was wrong in how many."""
    draw, figures = random.Random(seed), Figures()
    flaws: dict[str, int] = {}
    (root / "disk" / "home").mkdir(parents=True)
    (root / "disk" / "tmp").mkdir()
    tempfile.tempdir = str(root / "disk" / "tmp")
    operation.begin(root / "disk" / "home")
    before = operation.read(root / "disk" / "home")
    with recorded(root / "disk") as recording:
        operation.act(root / "disk" / "home")
    after = operation.read(root / "disk" / "home")
    figures.calls = len(recording.moments) - 1
    states = all_states(recording, draw)
    figures.states = len(states)
    for number, (state, moment) in enumerate(draw.sample(states, min(STATES, len(states)))):
        place = root / f"state-{number}"
        try:
            check(operation, state, place, (before, after), ended=moment == recording.moments[-1])
        except (AssertionError, Torn, NbpeftError, OSError, ValueError) as error:
            figures.torn += 1
            told = f"{type(error).__name__} {error}"[:400]
            flaws[told] = flaws.get(told, 0) + 1
        shutil.rmtree(place)
    return figures, flaws


def all_states(recording: Recording, draw: random.Random) -> list[tuple[State, int]]:
    """The different states, each with the last moment at which it may be left."""
    found: dict[int, tuple[State, int]] = {}
    moments = draw.sample(recording.moments[:-1], min(MOMENTS, len(recording.moments) - 1))
    for moment in [*sorted(moments), recording.moments[-1]]:
        for state in recording.states(moment, draw, orders=ORDERS, tears=TEARS):
            found[hash(tuple(state.items()))] = state, moment
    return list(found.values())


@pytest.mark.parametrize("name", [*RUNS, *OTHERS, *SAVES])
def test_what_is_read_after_a_loss_of_power_is_before_or_after(
    name: str, operations: dict[str, Operation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    figures, flaws = flawed(operations[name], tmp_path, name)
    print(name, figures)
    assert not flaws, "\n".join(flaws)


def not_flushed(home: Path) -> None:
    (home / "target" / "new").write_text("new")
    os.replace(home / "target" / "new", home / "target" / "first")


def folder_not_flushed(home: Path) -> None:
    with open(home / "target" / "new", "w") as file:
        file.write("new")
        file.flush()
        os.fsync(file.fileno())
    os.replace(home / "target" / "new", home / "target" / "first")


def one_after_the_other(home: Path) -> None:
    for name in ("first", "second"):
        replace_files(home / "target", [NewFile.of_text(name, "new")])


@pytest.mark.parametrize(
    ("act", "flaw"),
    [(not_flushed, "target is"), (folder_not_flushed, "what was written is lost"), (one_after_the_other, "target is")],
)
def test_a_write_that_is_not_atomic_is_found(
    act: Callable[[Path], object], flaw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setitem(globals(), "MOMENTS", 1000)
    monkeypatch.setitem(globals(), "STATES", 1000)

    def read(home: Path) -> dict[str, Any]:
        return {"target": [(home / "target" / name).read_text() for name in ("first", "second")]}

    def begin(home: Path) -> None:
        file_of(home)
        (home / "target" / "second").write_text("old")

    _, flaws = flawed(Operation(begin, act, read), tmp_path, "")
    assert any(flaw in told for told in flaws), flaws
