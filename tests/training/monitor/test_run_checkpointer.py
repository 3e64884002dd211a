"""A run on disk while it goes on: what is written, how often, and what an end at any moment leaves."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nbpeft.errors import CheckpointError, TrainingError, TrainingInterrupted
from nbpeft.runs.folder import RunFolder
from nbpeft.runs.store import RunPlace, RunStore
from nbpeft.state import Sample
from nbpeft.training import Run, RunControl, train
from nbpeft.training.disk.checkpoints import flaw_of
from nbpeft.training.monitor import run_checkpointer
from tests.char_tokenizer import CharTokenizer
from tests.faults.killing import after_call, die, drawn, forked
from tests.tiny_models import same_state
from tests.training.support import Clock, token_rows, trainable, weights

QUICK: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.01}
TOKEN = "hf_" + "aB3d" * 8


def two(**config: Any) -> Any:
    model = trainable(name="a", **config)
    model.manager.copy("a", "b")
    return model


@dataclass(frozen=True)
class Kind:
    """A kind of training.

    Attributes:
        model: makes its model, from settings of the config.
        rows: its rows.
        given: further arguments.
    """

    model: Callable[..., Any]
    rows: Any
    given: dict[str, Any] = field(default_factory=dict)

    def train(self, model: Any, **more: Any) -> Any:
        return train(model, self.rows, **QUICK | self.given | more)


PAIRS = [{"prompt": f"{number} is ", "chosen": "yes " * number, "rejected": "no"} for number in range(1, 17)]
PLAIN = Kind(trainable, token_rows())
SIMPO = Kind(trainable, PAIRS, {"objective": "simpo", "tokenizer": CharTokenizer()})
SEVERAL = Kind(two, {"a": token_rows(8, 1), "b": token_rows(13, 2)})
KINDS = pytest.mark.parametrize("kind", [PLAIN, SIMPO, SEVERAL], ids=["plain", "simpo", "several"])


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for adapter in model.peft_config for name, tensor in weights(model, adapter).items()}


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


class EachStep(TrainerCallback):
    def __init__(self, act: Any) -> None:
        self.act = act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act(state.global_step)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps a state after every step."""
    monkeypatch.setattr(run_checkpointer, "SHORTEST", 0.0)
    monkeypatch.setattr(run_checkpointer, "SHARE", 1e9)


def the_run(place: Path) -> Any:
    (record,) = RunStore(place).records()
    return record


def facts(place: Path) -> Any:
    return json.loads(Path(the_run(place).path, "run.json").read_text())


def test_what_older_runs_lost_is_noted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunStore, "tidy", lambda store: ["the oldest run was deleted"])
    result = train(trainable(), token_rows(), run_dir=place, **QUICK)
    assert "the oldest run was deleted" in result.message


def test_a_curve_is_flushed_before_each_checkpoint(place: Path, often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a loss of power could leave a checkpoint whose run has no losses for its last steps."""
    calls: list[str] = []
    for owner, name in ((RunFolder, "append"), (RunFolder, "flush"), (run_checkpointer, "put_checkpoint")):
        original: Any = getattr(owner, name)

        def noted(*args: Any, _name: str = name, _call: Any = original, **kwargs: Any) -> Any:
            calls.append(_name)
            return _call(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)
    train(trainable(), token_rows(), run_dir=place, **QUICK | {"max_steps": 3, "logging_steps": 1})
    checkpoints = [number for number, name in enumerate(calls) if name == "put_checkpoint"]
    assert len(checkpoints) >= 3 and calls.count("append") >= 3
    assert all(calls[number - 1] == "flush" for number in checkpoints)


def test_a_finished_run_keeps_its_adapter_and_its_curve(place: Path) -> None:
    model = trainable(name="sql")
    result = train(model, token_rows(), token_rows(4), run_dir=place, **QUICK)
    record = the_run(place)
    assert (record.name, record.status, record.step, record.total_steps) == ("sql-1", "finished", 6, 6)
    assert (record.loss, record.eval_loss) == (result.state.loss, result.eval_loss)
    assert result.state.folder == record.path
    (state,) = Path(record.path).glob("checkpoint-*")
    assert sorted(path.name for path in state.rglob("*") if path.is_file()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainer_state.json",
    ]
    lines = [json.loads(line) for line in Path(record.path, "curve.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [(line["step"], line["loss"]) for line in logged] == list(result.state.history)
    assert {"learning_rate", "grad_norm", "seconds", "epoch"} <= logged[0].keys()
    assert lines[-2]["eval_loss"] == result.eval_loss or lines[-1].get("train_runtime")
    assert record.settings["r"] == 4 and record.settings["learning_rate"] == 0.01 and record.settings["rows"] == 32


def test_nothing_is_written_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(trainable(), token_rows(), **QUICK).state.folder == ""
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_small_and_whole_and_there_are_two_at_most(place: Path, often: None) -> None:
    """Never the base, the tokenizer or other adapters."""
    model = trainable(name="sql")
    model.add_adapter("other", model.peft_config["sql"])
    seen: list[list[str]] = []

    def look(step: int) -> None:
        (run,) = place.glob("*-1")
        states = sorted(run.glob("checkpoint-*"))
        seen.append([state.name for state in states])
        assert all(flaw_of(state) is None for state in states)
        names = {str(path.relative_to(states[-1])) for path in states[-1].rglob("*") if path.is_file()}
        own = {"README.md", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
        assert names == own | {"sql/adapter_config.json", "sql/adapter_model.safetensors"}
        parameters = sum(part.numel() for part in model.manager.parameters("sql"))
        assert sum(path.stat().st_size for path in states[-1].rglob("*")) < 16 * parameters + 60_000

    train(model, token_rows(), run_dir=place, callbacks=[EachStep(look)], **QUICK)
    assert seen[0] == ["checkpoint-0"] and seen[1:] == [[f"checkpoint-{n - 1}", f"checkpoint-{n}"] for n in range(1, 6)]


@pytest.mark.slow
def test_how_often_follows_from_what_a_state_costs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ten seconds at first, and never more than two per cent of the time."""
    clock, cost, written = Clock(), [0.5], []
    put = run_checkpointer.put_checkpoint

    def slowly(home: Path, step: int, *args: Any, **kwargs: Any) -> None:
        put(home, step, *args, **kwargs)
        written.append((step, clock.now))
        clock.advance(cost[0])

    class Keeper(run_checkpointer.RunCheckpointer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, clock=clock)

    monkeypatch.setattr(run_checkpointer, "put_checkpoint", slowly)
    monkeypatch.setattr("nbpeft.training.loop.fitting.RunCheckpointer", Keeper)
    steps = EachStep(lambda step: clock.advance(5.0))
    train(trainable(), token_rows(), run_dir=place, callbacks=[steps], **QUICK | {"max_steps": 30})
    times = [when for step, when in written[:-1]]  # the last is written when the run ends
    assert times[0] == 0.0 and all(33.3 <= later - earlier <= 40.0 for earlier, later in itertools.pairwise(times))
    written.clear()
    cost[0] = 0.001
    train(trainable(), token_rows(), run_dir=place, callbacks=[steps], **QUICK | {"max_steps": 30})
    times = [when for _, when in written[:-1]]
    assert all(10.0 <= later - earlier < 15.1 for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize(("cost", "pause"), [(0.01, 10.0), (0.3, 20.0), (0.75, 50.0), (5.0, 60.0), (30.0, 300.0)])
def test_one_slow_write_does_not_end_the_checkpoints(cost: float, pause: float) -> None:
    assert run_checkpointer._pause_after(cost) == pytest.approx(pause)


def test_stop_keeps_the_step_it_stopped_at(place: Path) -> None:
    control = RunControl()
    result = train(
        trainable(), token_rows(), control=control, run_dir=place, callbacks=[At(3, control.request_stop)], **QUICK
    )
    record = the_run(place)
    assert (result.status, record.status, record.step, record.kept_steps) == ("stopped", "stopped", 3, (3, 0))
    assert (
        flaw_of(Path(record.path, "checkpoint-3")) is None and Path(record.path, "checkpoint-3/optimizer.pt").exists()
    )


def test_a_resumed_run_is_running_before_its_first_checkpoint(place: Path) -> None:
    control, statuses = RunControl(), []
    stop = At(3, control.request_stop)
    train(trainable(), token_rows(), control=control, run_dir=place, callbacks=[stop], **QUICK)
    record = the_run(place)
    assert record.status == "stopped"
    state = str(Path(record.path, "checkpoint-3"))
    where: dict[str, Any] = {"run_dir": RunPlace(RunStore(place), record.name), "resume_from_checkpoint": state}
    looks = EachStep(lambda step: statuses.append(the_run(place).status))
    train(trainable(), token_rows(), callbacks=[looks], **QUICK, **where)
    assert statuses == ["running"] * 3


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *(("an interruption", kind) for kind in (PLAIN, SEVERAL)),
        *(("a failure", kind) for kind in (PLAIN, SIMPO, SEVERAL)),
    ],
)
def test_what_ends_a_run_between_steps_keeps_the_last_one(place: Path, how: str, kind: Kind) -> None:
    """With the random numbers of that step, however many were drawn since."""

    class Breaks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                torch.rand(100)
                if how == "a failure":
                    raise ValueError("no such row")
                os.kill(os.getpid(), signal.SIGINT)

    with contextlib.suppress(ValueError, KeyboardInterrupt):
        kind.train(kind.model(lora_dropout=0.3), run_dir=place, callbacks=[Breaks()])
    record = the_run(place)
    assert (record.status, record.step, record.kept_steps) == ("failed" if how == "a failure" else "stopped", 4, (4, 0))
    assert how != "a failure" or "no such row" in record.message
    straight, again = kind.model(lora_dropout=0.3), kind.model(lora_dropout=0.3)
    kind.train(straight)
    where = RunPlace(RunStore(place), record.name)
    kind.train(again, run_dir=where, resume_from_checkpoint=str(Path(record.path, "checkpoint-4")))
    assert same_state(adapters(straight), adapters(again))


def test_a_second_interruption_waits_until_the_last_state_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def interrupted(folder: Path, step: int, *args: Any, **options: Any) -> None:
        interrupt(step)
        put(folder, step, *args, **options)

    put = run_checkpointer.put_checkpoint
    monkeypatch.setattr(run_checkpointer, "put_checkpoint", interrupted)
    with pytest.raises(TrainingInterrupted) as caught:
        train(trainable(), token_rows(), run_dir=place, callbacks=[EachStep(interrupt)], **QUICK)
    assert caught.value.result.steps == 3
    record = the_run(place)
    assert (record.status, record.kept_steps[0]) == ("stopped", 3)
    RunStore(place).rename(record.name, "free")


@KINDS
def test_an_interruption_inside_a_step_keeps_no_half_of_it(place: Path, kind: Kind) -> None:
    class Breaks(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:  # the weights have moved, the step is not counted
                raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted) as caught:
        kind.train(kind.model(), run_dir=place, callbacks=[Breaks()])
    assert the_run(place).kept_steps == (0,)
    said = "ended while step 5 changed the weights: the last checkpoint is that of step 0"
    assert said in caught.value.result.message and said in the_run(place).message


@pytest.mark.parametrize(
    "wrong", [{"max_steps": "x"}, {"optim": "adamm"}, {"callbacks": [EachStep(lambda step: 1 / 0)]}]
)
def test_a_run_that_never_began_leaves_nothing(place: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, ZeroDivisionError)):
        train(trainable(), token_rows(), run_dir=place, **QUICK | wrong)
    assert not place.exists() or [path.name for path in place.iterdir()] == [".gitignore"]


def test_where_nothing_can_be_written_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = train(trainable(), token_rows(), run_dir=tmp_path / "file" / "runs", **QUICK)
    assert (result.status, result.steps, result.state.folder) == ("finished", 6, "")
    assert result.message.startswith("this run is not saved on disk: ") and result.message.count("saved") == 1


def test_a_run_whose_settings_cannot_be_written_leaves_no_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(RunFolder, "write", full)
    result = train(trainable(), token_rows(), run_dir=place, **QUICK)
    assert result.steps == 6 and "not saved on disk from now on: the disk is full" in result.message
    assert [path.name for path in place.iterdir()] == [".gitignore"] and not result.state.folder


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((error, PLAIN) for error in (NO_SPACE, MemoryError(), torch.OutOfMemoryError("CUDA out of memory."))),
        *((NO_SPACE, kind) for kind in (SIMPO, SEVERAL)),
    ],
)
def test_a_disk_or_a_memory_that_fills_ends_the_keeping_alone(
    error: Exception, kind: Kind, place: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = run_checkpointer.put_checkpoint

    def full(home: Path, step: int, *args: Any, **kwargs: Any) -> None:
        if step >= 3:
            raise error
        put(home, step, *args, **kwargs)

    monkeypatch.setattr(run_checkpointer, "put_checkpoint", full)
    result = kind.train(kind.model(), run_dir=place)
    assert (result.status, result.steps) == ("finished", 6) and "on disk from now on: " in result.message
    record = the_run(place)
    assert (record.status, record.step, record.kept_steps) == ("finished", 6, (2, 1))
    assert not record.is_complete, "it can go on from its last state"


def largest_file(place: Path) -> int:
    return max(path.stat().st_size for path in place.rglob("*") if path.is_file())


def train_in_files_of(limit: int, place: Path) -> None:
    """Trains where no file can grow beyond a size; says so where something was not kept, and ends as it ended."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = train(trainable(), token_rows(), run_dir=place, **QUICK | {"max_steps": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (result.status, result.steps) == ("finished", 3)
    records = RunStore(place).records()
    whole = bool(records) and records[0].is_complete
    assert whole or "this run is not saved on disk" in result.message
    assert [(record.status, record.step) for record in records] in ([], [("finished", 3)])
    assert not list(place.glob("**/.nbpeft-*"))


@pytest.mark.drawn(2)
@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.6, 0.98])
def test_a_disk_that_is_full_is_a_note(share: float, place: Path, often: None) -> None:
    train(trainable(), token_rows(), run_dir=place / "whole", **QUICK | {"max_steps": 3})
    train_in_files_of(int(share * largest_file(place / "whole")), place / "full")


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_size_is_a_note(place: Path, often: None) -> None:
    train(trainable(), token_rows(), run_dir=place / "whole", **QUICK | {"max_steps": 3})
    largest = largest_file(place / "whole")
    for number in range(40):
        train_in_files_of(number * largest // 36, place / str(number))


def test_a_run_ends_as_it_ended_where_nothing_can_be_written_any_more(
    place: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a new ``run.json``."""

    def full(*_: object, **__: object) -> None:
        raise CheckpointError("the disk is full")

    def fill() -> None:
        monkeypatch.setattr("nbpeft.runs.folder.replace_files", full)
        monkeypatch.setattr(run_checkpointer, "put_checkpoint", full)
        seen.append(RunStore(place).records()[0].status)

    seen: list[str] = []
    train(trainable(), token_rows(), run_dir=place, callbacks=[At(3, fill)], **QUICK)
    record = the_run(place)
    assert (seen, record.status, record.step) == (["running"], "finished", 6)
    assert record.settings["r"] == 4 and facts(place)["arguments"]["max_steps"] == 6


def test_no_folder_of_another_run_keeps_a_training_from_its_end(place: Path) -> None:
    strange: dict[str, Any] = {"step": "1e999", "started": "1e300", "seconds": "Infinity", "status": '"running"'}
    for name, value in strange.items():
        (place / name).mkdir(parents=True)
        facts = {"version": 1, "adapter": "a", "status": "finished", name: "@"}
        (place / name / "run.json").write_text(json.dumps(facts).replace('"@"', value))
    os.mkfifo(place / "status" / "curve.jsonl")
    (place / "link").symlink_to(place / "step")
    (place / "zero").mkdir()
    (place / "zero" / "run.json").symlink_to("/dev/zero")
    result = train(trainable(name="sql"), token_rows(), run_dir=place, **QUICK)
    assert (result.status, result.steps, result.message) == ("finished", 6, "")
    records = {record.name: record.status for record in RunStore(place).records()}
    assert records.pop("sql-1") == "finished" and set(records.values()) == {"unreadable"} and len(records) == 6


def test_a_folder_that_is_removed_meanwhile_ends_the_keeping_alone(place: Path, often: None) -> None:
    result = train(trainable(), token_rows(), run_dir=place, callbacks=[At(3, lambda: shutil.rmtree(place))], **QUICK)
    assert (result.status, result.steps) == ("finished", 6)


def test_no_token_is_kept(place: Path, often: None) -> None:
    train(trainable(), token_rows(), run_dir=place, hub_token=TOKEN, run_name=TOKEN, **QUICK)
    texts = [path.read_bytes() for path in place.rglob("*") if path.is_file()]
    assert len(texts) > 4 and not any(TOKEN.encode() in text for text in texts)
    assert facts(place)["secrets"] == ["hub_token", "run_name"]


def test_a_folder_of_the_users_own_is_as_ever(place: Path, tmp_path: Path, often: None) -> None:
    own = tmp_path / "own"
    train(trainable(), token_rows(), run_dir=place, output_dir=str(own), save_strategy="steps", save_steps=4, **QUICK)
    assert {path.name for path in own.iterdir()} >= {"checkpoint-4", "adapter_model.safetensors"}
    assert the_run(place).kept_steps == (6,)


def test_samples_and_values_over_time_are_readable(place: Path) -> None:
    class Shows(Run):
        def _build(self) -> Any:
            import dataclasses

            samples = (Sample(3, "Oslo?", "NP35", "Oslo is a city"),)
            return dataclasses.replace(super()._build(), samples=samples, series={"tokens/s": ((1, 5.0), (2, 6.0))})

    train(trainable(), token_rows(), run_dir=place, run_factory=Shows, **QUICK)
    folder = Path(the_run(place).path)
    assert json.loads((folder / "series.json").read_text())["tokens/s"] == [[1, 5.0], [2, 6.0]]
    assert [json.loads(line)["answer"] for line in (folder / "samples.jsonl").read_text().splitlines()] == ["NP35"]


def test_other_rows_are_told_from_those_of_then() -> None:
    rows: list[dict[str, Any]] = [{"input_ids": [1, 2]}, {"input_ids": torch.tensor([3])}]
    mark = run_checkpointer.mark_of_rows(rows, rows[:1])
    run_checkpointer.check_rows_are_those(
        "sql-1", mark, run_checkpointer.mark_of_rows([dict(row) for row in rows], rows[:1])
    )
    for now, told in (
        (
            run_checkpointer.mark_of_rows(rows * 2, rows[:1]),
            "2 rows, but 4 are given: pass those of the run",
        ),
        (run_checkpointer.mark_of_rows(rows), "was trained with 1 evaluation rows, but none are given"),
        (run_checkpointer.mark_of_rows(rows[::-1], rows[:1]), "with other rows: pass those of the run"),
    ):
        with pytest.raises(TrainingError, match=told):
            run_checkpointer.check_rows_are_those("sql-1", mark, now)


def test_each_row_is_compared() -> None:
    rows = [{"input_ids": [1, place]} for place in range(40)]
    mark = run_checkpointer.mark_of_rows(rows)
    for place in (0, 8, 20, 39):
        other = [*rows]
        other[place] = {"input_ids": [2, place]}
        with pytest.raises(TrainingError, match="with other rows"):
            run_checkpointer.check_rows_are_those("sql-1", mark, run_checkpointer.mark_of_rows(other))


@pytest.mark.drawn(1)
@KINDS
def test_a_death_at_any_moment_leaves_a_state_to_go_on_from(kind: Kind, place: Path, often: None) -> None:
    """After each call that changes the disk."""

    def run(where: Path, model: Any, **more: Any) -> None:
        kind.train(model, run_dir=where, max_steps=4, **more)

    run(place / "first", kind.model())  # the first run of a process makes more calls, which its forks do not repeat
    with after_call(0, die) as calls:
        run(place / "whole", kind.model())
    for number in drawn(len(calls), full=24):
        where = place / str(number)

        def act(number: int = number, where: Path = where) -> None:
            with after_call(number, die):
                run(where, kind.model())

        assert forked(act)
        records = RunStore(where).records() if where.exists() else []
        if not records or not records[0].kept_steps:
            assert number < len(calls) / 4, "only before the first state was there"
            continue
        record = records[0]
        assert record.status == "crashed" or number > 3 * len(calls) / 4
        newest = Path(record.path, f"checkpoint-{record.kept_steps[0]}")
        assert flaw_of(newest) is None
        if record.status == "crashed":
            run(where, kind.model(), resume_from_checkpoint=str(newest))
