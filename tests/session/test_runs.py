"""Runs of a session: broken off and resumed, started anew."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nbpeft.checkpoint.staging import ASIDE, STAGING_PREFIX, mark_of, staging_name
from nbpeft.display.next_steps import next_steps
from nbpeft.errors import (
    AdapterError,
    BaseMismatchError,
    BusyError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    NbpeftError,
    TrainingError,
)
from nbpeft.runs.store import RunStore
from nbpeft.training.monitor import run_checkpointer
from tests.char_tokenizer import CharTokenizer
from tests.closeness import is_close
from tests.faults.killing import die
from tests.runs.killed import ARGUMENTS, LORA, adapted_session, rows, session_in, train_and_die, unbroken, when_noted
from tests.session.support import everything
from tests.tiny_models import gpt2, llama, same_state
from tests.training.support import token_rows, weights


def often() -> None:
    run_checkpointer.SHORTEST, run_checkpointer.SHARE = 0.0, 1e9


def rarely() -> None:
    """Only the state before the first step."""
    run_checkpointer.SHORTEST = 1e9


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that nothing broke off: its result and weights."""
    return unbroken(tmp_path_factory.mktemp("straight"), eval_data=token_rows(4, seed=5))


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of a run whose process was killed in step 8, with a state of step 7."""
    place = tmp_path_factory.mktemp("broken")
    assert train_and_die(place, 8, often, eval_data=token_rows(4, seed=5))
    return place


def resumed(place: Path, base: Any | None = None, **more: Any) -> Any:
    options = {"model": llama() if base is None else base, "variable": "model", "data": rows()}
    return session_in(place).resume(**options | {"eval_data": token_rows(4, seed=5)} | more)


@pytest.mark.drawn(1)
@pytest.mark.parametrize(("step", "prepare", "first"), [(3, rarely, 0), (6, often, 5), (11, often, 10)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    step: int, prepare: Any, first: int, straight: Any, tmp_path: Path
) -> None:
    """With dropout, accumulated gradients and shuffled epochs; the adapter comes back by itself."""
    assert train_and_die(tmp_path, step, prepare, eval_data=token_rows(4, seed=5))
    assert [record.status for record in session_in(tmp_path).runs().records] == ["crashed"]
    result = resumed(tmp_path)
    assert (result.run, result.step, result.training.state.first_step) == ("sql-1", first, first)
    through, ended = straight[0].state, result.training.state
    assert ended.history == through.history and ended.eval_history == through.eval_history
    after = weights(result.model, "sql")
    assert all(is_close(after[name], value) for name, value in straight[1].items())
    (record,) = session_in(tmp_path).runs().records
    assert (record.status, record.step, record.best_loss) == ("finished", 14, min(v for _, v in through.eval_history))


def dying_with_a_state(step: int) -> Callable[[], None]:
    """Makes a process die as soon as the state of a step is on disk."""

    def prepare() -> None:
        often()
        module: Any = run_checkpointer
        put = module.put_checkpoint

        def putting(folder: Path, at: int, *args: Any, **more: Any) -> None:
            put(folder, at, *args, **more)
            if at == step:
                die()

        module.put_checkpoint = putting

    return prepare


def test_a_state_is_on_disk_with_the_curves_until_its_step(straight: Any, tmp_path: Path) -> None:
    assert train_and_die(tmp_path, 99, dying_with_a_state(4), eval_data=token_rows(4, seed=5))
    result = resumed(tmp_path)
    assert result.step == 4
    for name in ("gradient norm", "learning rate"):
        assert result.training.state.series[name] == straight[0].state.series[name]


def test_a_run_that_was_stopped_goes_on_with_the_adapter_there_is(straight: Any, tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    end = session.on_run(lambda run, name: when_noted(run, 4, run.control.request_stop))
    session.train(model, rows(), token_rows(4, seed=5), **ARGUMENTS)
    end()
    result = session.resume(model="model", data=rows(), eval_data=token_rows(4, seed=5))
    assert (result.step, result.training.steps) == (4, 14)
    assert same_state(weights(model, "sql"), straight[1])
    assert str(result).startswith("resumed sql-1 at step 4: sql finished · 14 steps")


class Mine(TrainerCallback):
    pass


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no rows": ({"data": None}, TrainingError, "resuming run sql-1 needs its training data: pass data=…"),
    "more rows": ({"data": token_rows(25)}, TrainingError, "24 rows, but 25 are given: pass those of the run (data=…)"),
    "other rows": ({"data": token_rows(24, seed=9)}, TrainingError, "run sql-1 was trained with other rows"),
    "no rows to evaluate on": ({"eval_data": None}, TrainingError, "4 evaluation rows, but none are given"),
    "an unknown field": ({"learning_rat": 1}, ConfigError, "Did you mean 'learning_rate'"),
    "another base": ({"model": llama(seed=4)}, BaseMismatchError, "trained on other weights of the same shapes"),
    "another architecture": ({"model": gpt2()}, BaseMismatchError, "trained on LlamaForCausalLM with 16 weights"),
    "no such run": ({"run": "sql-7"}, CheckpointNotFoundError, "no run is called 'sql-7'"),
}


@pytest.mark.drawn(4)
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_belong_to_the_run_is_one_line_and_changes_nothing(case: str, broken_off: Path) -> None:
    given, error, told = WRONG[case]
    base = given.get("model", llama())
    before, files = {name: value.clone() for name, value in base.state_dict().items()}, listing(broken_off)
    with pytest.raises(error) as caught:
        resumed(broken_off, **{"model": base} | given)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert same_state(dict(base.state_dict()), before)
    assert not hasattr(base, "peft_config") and listing(broken_off) == files


def listing(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_an_adapter_that_is_configured_otherwise_is_refused(broken_off: Path) -> None:
    session = session_in(broken_off)
    model = session.add(llama(), {**LORA, "r": 2}, name="sql", variable="model").model
    before = everything(model)
    with pytest.raises(AdapterError, match="'sql' has r=2, and in run sql-1 it had 4: delete or rename it first"):
        session.resume(model=model, data=rows())
    assert same_state(everything(model), before)


@pytest.mark.slow
def test_a_packed_run_goes_on_with_its_sequences(tmp_path: Path) -> None:
    packing: dict[str, Any] = {"packing": True, "max_length": 25, "per_device_train_batch_size": 2}
    through, expected = unbroken(tmp_path / "whole", **packing)
    session, model = adapted_session(tmp_path)
    end = session.on_run(lambda run, name: when_noted(run, 8, run.control.request_stop))
    session.train(model, rows(), **ARGUMENTS | packing)
    end()
    result = session.resume(model="model", data=rows())
    assert (result.step, result.training.steps) == (8, 14) and result.training.state.history == through.state.history
    assert same_state(weights(model, "sql"), expected)


def test_weights_are_as_before_when_a_resumed_run_cannot_begin(broken_off: Path) -> None:
    """They were replaced by those of the state already."""

    class Fails(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("no such row")

    session = session_in(broken_off)
    torch.manual_seed(5)
    model = session.add(llama(), LORA, name="sql", variable="model").model
    before, files = everything(model), listing(broken_off)
    with pytest.raises(ValueError, match="no such row"):
        session.resume(model=model, data=rows(), eval_data=token_rows(4, seed=5), callbacks=[Fails()])
    assert same_state(everything(model), before)
    changed = {name for name, data in listing(broken_off).items() if files.get(name) != data}
    assert not changed
    assert [record.status for record in session.runs().records] == ["crashed"]


def test_a_run_that_had_finished_gives_its_adapter_back(straight: Any, tmp_path: Path) -> None:
    unbroken(tmp_path, eval_data=token_rows(4, seed=5))
    result = session_in(tmp_path).resume(model=llama(), variable="model")
    assert str(result) == "run sql-1 had finished: sql is restored as it was after step 14"
    assert same_state(weights(result.model, "sql"), straight[1])
    again = session_in(tmp_path).resume(model=llama(), variable="other", data=rows(), tokenizer=CharTokenizer())
    unused = "not used, because nothing is left to train: data, tokenizer"
    assert (str(again), again.notes) == (f"{result} · {unused}", (unused,)), "told, as nothing of it has an effect"
    with pytest.raises(AdapterError, match="run sql-1 had finished, and 'sql' is on the model"):
        session_in(tmp_path).resume(model=result.model)


def test_a_run_that_had_finished_takes_no_arguments(straight: Any, tmp_path: Path) -> None:
    """It has no state that they could change."""
    session, model = adapted_session(tmp_path)
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 2})
    base, files = llama(), listing(tmp_path)
    for given, error, told in (
        ({"max_stepz": 4}, ConfigError, "'max_stepz' is not a field of TrainingArguments. Did you mean 'max_steps'"),
        ({"max_steps": 4}, TrainingError, "max_steps=… cannot be used: run sql-1 had finished and has no state to"),
        ({"betta": 0.1}, ConfigError, "Did you mean"),
        ({"patience": 2, "beta": 0.2}, TrainingError, "patience=…, beta=… cannot be used"),
    ):
        with pytest.raises(error) as caught:
            session_in(tmp_path).resume(model=base, variable="model", **given)
        assert told in str(caught.value)
        assert not hasattr(base, "peft_config") and listing(tmp_path) == files


@pytest.mark.parametrize("given", [{"max_steps": 3}, {"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 0.01}])
def test_fewer_steps_than_a_run_has_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    """They would end the run, whose state would then be lost."""
    session, model = adapted_session(tmp_path)
    end = session.on_run(lambda run, name: when_noted(run, 4, run.control.request_stop))
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 8})
    end()
    before, files = everything(model), listing(tmp_path)
    with pytest.raises(TrainingError, match=r"run sql-1 is at step 4 and would end at step [134]: .* with 8 steps"):
        session.resume(model=model, data=rows(), **given)
    assert same_state(everything(model), before) and listing(tmp_path) == files
    assert session.resume(model=model, data=rows(), max_steps=6).training.steps == 6


def test_another_adapter_is_active_again_when_a_resumed_run_cannot_begin(broken_off: Path) -> None:
    session = session_in(broken_off)
    model = session.add(llama(), LORA, name="other", variable="model").model
    session.add(model, LORA, name="chosen")
    before = everything(model)
    with pytest.raises(TrainingError, match="but 25 are given"):
        session.resume(model=model, data=token_rows(25))
    assert same_state(everything(model), before)
    assert (model.manager.names, model.manager.active) == (("other", "chosen"), ("chosen",))


def test_a_run_of_two_adapters_comes_back_with_both_or_neither(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    session.add(model, LORA, name="b")
    session.use(["sql", "b"])
    end = session.on_run(lambda run, name: when_noted(run, 3, run.control.request_stop))
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 5})
    end()
    session.delete("b")
    assert session.resume(model=model, data=rows()).training.steps == 5
    assert model.manager.active == ("sql", "b")
    weights_file = max(tmp_path.glob("sql*b-1/checkpoint-*")) / "b" / "adapter_model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-8])
    base = llama()
    with pytest.raises(NbpeftError):
        session_in(tmp_path).resume(model=base, variable="model")
    assert not hasattr(base, "peft_config")


def test_what_another_run_trained_is_not_overwritten(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    end = session.on_run(lambda run, name: when_noted(run, 4, run.control.request_stop))
    session.train(model, rows(), **ARGUMENTS)
    end()
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 2})
    before = everything(model)
    told = "'sql' was trained by run sql-2 since, and resuming run sql-1 would undo that: rename or delete it first"
    with pytest.raises(AdapterError, match=told):
        session.resume("sql-1", model=model, data=rows())
    assert same_state(everything(model), before)
    session.rename("sql", "later")
    assert session.resume("sql-1", model=model, data=rows()).training.steps == 14
    assert model.manager.names == ("later", "sql") and same_state(weights(model, "later"), before_of(before, "sql"))


def before_of(everything_then: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    """Weights of an adapter that is called ``later`` now, as they were."""
    return {
        path.replace(f".{name}.", ".later."): value
        for path, value in everything_then["weights"].items()
        if f".{name}." in path
    }


def test_objects_of_the_run_have_to_be_given_again(tmp_path: Path) -> None:
    assert train_and_die(tmp_path, 3, callbacks=[Mine()])
    with pytest.raises(TrainingError, match=r"values that its folder does not store; pass them again: callbacks=…"):
        resumed(tmp_path, eval_data=None)
    assert resumed(tmp_path, eval_data=None, callbacks=[Mine()]).training.steps == 14


@pytest.mark.drawn(1)
@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_ends_with_the_best_state_as_the_unbroken_one(step: int, tmp_path: Path) -> None:
    """Patience and what is held out are the run's; neither has to be given again."""
    given = {"patience": 3, "eval_data": 6, "eval_steps": 1, "learning_rate": 0.02, "seed": 1}
    through, expected = unbroken(tmp_path / "whole", **given)
    assert "the best weights, of step" in through.message and through.steps == 7
    assert train_and_die(tmp_path / "broken", step, often, **given)
    result = session_in(tmp_path / "broken").resume(model=llama(), variable="model", data=rows())
    assert same_state(weights(result.model, "sql"), expected)
    assert result.training.message == through.message and result.training.steps == through.steps


def test_what_is_not_taken_from_the_folder_of_a_run_is_named(tmp_path: Path) -> None:
    given = {"output_dir": tmp_path / "out", "hub_token": "hf_" + "aB3d" * 8, "seed": 3, "save_strategy": "no"}
    session, model = adapted_session(tmp_path / "runs")
    end = session.on_run(lambda run, name: when_noted(run, 3, run.control.request_stop))
    session.train(model, rows(), **ARGUMENTS | given)
    end()
    for file in (tmp_path / "out").iterdir():
        file.unlink() if file.is_file() else None
    result = session.resume(model="model", data=rows())
    names = "'output_dir', 'save_strategy', 'hub_token'"
    assert result.notes == (f"not restored from the folder of the run: {names}; pass them again to use them",)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert all(note in str(result) for note in result.notes)
    (record,) = session.runs().records
    assert record.settings["seed"] == 3


def test_what_is_given_to_resume_is_kept_for_the_next_time(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    for step, given in ((3, {}), (6, {"weight_decay": 0.5}), (None, {})):
        end = session.on_run(lambda run, name, at=step: when_noted(run, at, run.control.request_stop) if at else None)  # type: ignore[misc]
        if step == 3:
            session.train(model, rows(), **ARGUMENTS)
        else:
            session.resume(model=model, data=rows(), **given)
        end()
    _, facts = session.kept_run("sql-1")
    assert facts["arguments"]["weight_decay"] == 0.5 and facts["settings"]["weight_decay"] == 0.5


def test_processes_that_the_machine_lacks_have_to_be_given_again(tmp_path: Path) -> None:
    assert train_and_die(tmp_path, 3)
    file = tmp_path / "sql-1/run.json"
    facts = json.loads(file.read_text())
    facts["arguments"]["processes"] = 4096
    file.write_text(json.dumps(facts))
    with pytest.raises(TrainingError, match="not restored from its folder; pass them again: processes=…"):
        resumed(tmp_path, eval_data=None)


def test_of_a_run_without_states_only_the_curve_is_left(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="there is nothing to resume"):
        session.resume(model=model, data=rows())
    assert train_and_die(tmp_path, 2)
    for path in sorted((tmp_path / "sql-1").glob("checkpoint-*/**/*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "sql-1/checkpoint-0").rmdir()
    with pytest.raises(CheckpointNotFoundError, match="run sql-1 has no checkpoint left"):
        session.resume(model=model, data=rows())


def test_training_again_says_from_where_it_goes_on(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    first = session.train(model, rows(), **ARGUMENTS | {"max_steps": 5})
    assert "continues from" not in str(first)
    session.rename("sql", "orders")
    second = session.train(model, rows(), **ARGUMENTS | {"max_steps": 3})
    assert (second.state.first_step, second.state.step, second.steps) == (0, 3, 3)
    assert "continues from the weights after step 5 of run sql-1 (new learning-rate schedule)" in str(second)
    settings = {record.path: record.settings for record in session.runs().records}
    own = settings[second.state.folder]
    assert (own["starts from"], own["rows"]) == ("the weights after step 5 of run sql-1", len(rows()))
    assert "starts from" not in settings[first.state.folder]
    third = session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    assert "after step 3 of run orders-1" in str(third), "a step of that run, not the sum of all runs"
    session.add(model, {**LORA, "r": 2}, name="orders")  # its weights start anew
    assert "continues from" not in str(session.train(model, rows(), **ARGUMENTS | {"max_steps": 1}))


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "pissa"}]
)
def test_restarting_gives_the_numbers_of_the_first_time(tmp_path: Path, fields: dict[str, Any]) -> None:
    session = session_in(tmp_path)
    model = session.add(llama(), LORA | fields, name="sql", variable="model").model
    short = ARGUMENTS | {"max_steps": 4}
    first, after = session.train(model, rows(), **short), weights(model, "sql")
    second = session.train(model, rows(), **short)
    assert second.state.history != first.state.history
    session.scale("sql", 0.5)
    session.scale("sql", 1.0)
    third = session.train(model, rows(), restart=True, **short)
    assert third.state.history == first.state.history
    assert "restarts sql from new weights; run sql-2 has the former ones" in third.message
    assert same_state(weights(model, "sql"), after)
    assert session.train(model, rows(), restart=True, **short).state.history == first.state.history


def test_restarting_keeps_other_adapters_and_what_is_active(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    session.add(model, LORA, name="chat")
    session.use("sql")
    session.scale("sql", 2.0)
    before = weights(model, "chat")
    session.train(model, rows(), restart=True, **ARGUMENTS | {"max_steps": 2})
    assert model.manager.active == ("sql",) and model.manager.scale("sql") == 2.0
    assert same_state(weights(model, "chat"), before)


@pytest.mark.parametrize("wrong", [{"max_steps": "x"}, {"data": [{"input_ids": [1]}, {"x": 1}]}, {"adapter": "nope"}])
def test_a_restart_that_cannot_begin_leaves_the_weights(tmp_path: Path, wrong: dict[str, Any]) -> None:
    session, model = adapted_session(tmp_path)
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 2})
    before = everything(model)
    with pytest.raises(Exception, match=r".+"):
        session.train(model, **{"data": rows(), "restart": True, **ARGUMENTS} | wrong)
    assert same_state(everything(model), before)
    assert session.state.models[0].adapters[0].name == "sql"


def test_an_adapter_that_was_loaded_starts_from_the_seed(tmp_path: Path) -> None:
    session, _model = adapted_session(tmp_path / "runs")
    session.save(tmp_path / "saved")
    other = session_in(tmp_path / "runs")
    frozen = other.load(tmp_path / "saved", name="sql", model=llama(), variable="model")
    first = frozen.model
    assert frozen.notes == ("it is frozen: session.freeze('sql', off=True) makes it trainable",)
    with pytest.raises(TrainingError, match=r"model.set_requires_grad\('sql'\) makes it trainable"):
        other.train(first, rows(), **ARGUMENTS)
    second = other.load(tmp_path / "saved", name="sql", model=llama(), variable="second")
    assert second.notes == ("it is frozen: session.freeze('sql', off=True, model='second') makes it trainable",)
    other = session_in(tmp_path / "runs")
    loaded = other.load(tmp_path / "saved", name="sql", model=llama(), variable="model", trainable=True).model
    histories = [
        other.train(loaded, rows(), restart=True, **ARGUMENTS | {"max_steps": 2}).state.history for _ in range(2)
    ]
    assert histories[0] == histories[1]


def test_the_place_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NBPEFT_RUNS")
    session, model = adapted_session(tmp_path / "set")
    session.context.chosen_runs_folder = None
    quick = ARGUMENTS | {"max_steps": 1}
    monkeypatch.chdir("/")  # the folder of the notebook stays where it was
    assert session.train(model, rows(), **quick).state.folder == str(tmp_path / "nbpeft_runs/sql-1")
    monkeypatch.setenv("NBPEFT_RUNS", str(tmp_path / "elsewhere"))
    assert session.train(model, rows(), **quick).state.folder == str(tmp_path / "elsewhere/sql-1")
    assert session.train(model, rows(), keep=False, **quick).state.folder == ""
    monkeypatch.setenv("NBPEFT_RUNS", "off")
    assert session.train(model, rows(), **quick).state.folder == ""
    with pytest.raises(CheckpointNotFoundError, match="saving runs is disabled"):
        session.runs()


# What a run folder says that somebody else may have written


def changed(place: Path, name: str = "sql-1", **arguments: Any) -> None:
    """Adds arguments to the ``run.json`` of a run."""
    path = place / name / "run.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "arguments": {**facts["arguments"], **arguments}}))


@pytest.fixture
def broken(broken_off: Path, tmp_path: Path) -> Path:
    """A copy of the place of the killed run."""
    return Path(shutil.copytree(broken_off, tmp_path / "broken"))


def test_what_a_file_may_not_decide_is_named_and_not_done(broken: Path, straight: Any, tmp_path: Path) -> None:
    target = tmp_path / "project"
    foreign: dict[str, Any] = {"output_dir": str(target), "push_to_hub": True, "hub_model_id": "x/y"}
    foreign |= {"report_to": "wandb", "dataloader_num_workers": 7, "save_strategy": "steps", "adapter": "x"}
    changed(broken, **foreign, run_dir="/tmp")
    result = resumed(broken)
    (told,) = result.notes
    assert "not restored from the folder of the run: 'output_dir', 'push_to_hub', " in told and "and 2 more" in told
    assert not target.exists() and result.training.output_dir is None
    after = weights(result.model, "sql")
    assert all(is_close(after[name], value) for name, value in straight[1].items())


def test_what_a_file_may_not_decide_can_be_given_again(broken: Path, tmp_path: Path) -> None:
    changed(broken, output_dir="/nowhere")
    result = resumed(broken, output_dir=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "sql" / "adapter_config.json").exists() and result.training.steps == 14


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        ({"processes": 256}, "arguments that are not restored from its folder; pass them again: processes=…"),
        ({"processes": 256, "hosts": ["a", "b"]}, "pass them again: processes=…, hosts=…"),
        ({"deepspeed": "/etc/passwd"}, "pass them again: deepspeed=…"),
        ({"num_samples": 4}, "pass them again: num_samples=…"),
    ],
)
def test_what_may_change_the_losses_is_asked_for(arguments: dict[str, Any], reported: str, broken: Path) -> None:
    changed(broken, **arguments)
    with pytest.raises(TrainingError, match=reported):
        resumed(broken)


def test_many_objects_are_a_short_message(broken: Path) -> None:
    path = broken / "sql-1" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "objects": ["x" * 200] * 900}))
    with pytest.raises(TrainingError, match="values that its folder does not store") as caught:
        resumed(broken)
    assert len(str(caught.value)) < 400


def test_a_broken_run_is_named_beside_the_others(broken: Path) -> None:
    (broken / "zoo-1").mkdir()
    (broken / "zoo-1" / "run.json").symlink_to("/dev/zero")
    session = session_in(broken)
    found = session.runs()
    assert [record.name for record in found.records] == ["sql-1", "zoo-1"]
    for shown in (str(found), found._repr_html_()):
        assert "unreadable" in shown and "zoo-1/run.json is a link, not a plain file" in shown
    compared: Any = session.runs("zoo-1", "sql-1")
    assert [record.name for record in compared.records] == ["zoo-1", "sql-1"] and not compared.differing
    assert compared.curves["loss"][0] == ((), ()) and compared.curves["loss"][1][0]
    for shown in (str(compared), compared._repr_html_()):
        assert "run zoo-1 cannot be read: " in shown and "zoo-1/run.json is a link, not a plain file" in shown
    for act in (lambda: session.runs("zoo-1"), lambda: session.resume("zoo-1", model=llama(), data=rows())):
        with pytest.raises(CheckpointError, match=r"run zoo-1 cannot be read: .*zoo-1/run\.json is a link"):
            act()
    assert resumed(broken).run == "sql-1", "the newest that can be read"


@pytest.mark.drawn(2)
@pytest.mark.parametrize("kind", ["a link", "a pipe", "a large file", "a linked state"])
def test_a_state_with_something_else_in_it_is_passed_over(kind: str, broken: Path, tmp_path: Path) -> None:
    newest = broken / "sql-1" / "checkpoint-7"
    match kind:
        case "a link":
            (newest / "optimizer.pt").rename(tmp_path / "optimizer.pt")
            (newest / "optimizer.pt").symlink_to(tmp_path / "optimizer.pt")
        case "a pipe":
            os.mkfifo(newest / "scaler.pt")
        case "a large file":
            os.truncate(newest / "scheduler.pt", 2**33)
        case _:
            newest.rename(tmp_path / "elsewhere")
            newest.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"skipped checkpoint-7 \((.* is )?(a link|a named pipe|much larger than)"):
        result = resumed(broken)
    assert (result.step, result.training.steps) == (6, 14)


@pytest.mark.parametrize("whose", ["a stranger's", "own"])
def test_resuming_moves_nothing_through_a_link(whose: str, broken: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    run = broken / "sql-1"
    name = staging_name(run)
    staging = run / (name if whose == "own" else f"{STAGING_PREFIX}{'0' * 16}")
    (staging / "link").mkdir(parents=True)
    (staging / ASIDE).symlink_to(victim)
    (run / "link").symlink_to(victim)
    (staging / "link" / "evil.py").write_text("evil")
    marks = {"curve.jsonl": mark_of(run, "curve.jsonl"), "link/evil.py": [4, 0]}
    (staging / ".moves").write_text(json.dumps(marks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert resumed(broken).training.steps == 14
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"thesis.tex": "years of work"}
    assert staging.exists() is (whose != "own")


def test_an_adapter_with_a_comma_in_its_name_is_resumed_and_saved(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path / "runs")
    session.rename("sql", "orders, small")
    train = session.train(model, rows(), **ARGUMENTS | {"max_steps": 1}).state
    steps = next_steps(train, session.state, "model")
    assert train.names == ("orders, small",) and steps is not None and steps.saved is False
    session.save(tmp_path / "saved")
    assert session.runs().records[0].saved == {"orders, small": str(tmp_path / "saved")}
    again = session_in(tmp_path / "runs").resume(model=llama(), variable="model")
    assert again.adapters == ("orders, small",)
    assert same_state(weights(again.model, "orders, small"), weights(model, "orders, small"))


# What becomes of old runs


def test_where_an_adapter_was_saved_is_noted_with_its_run(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path / "runs")
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    (record,) = session.runs().records
    assert record.saved == {}
    session.rename("sql", "orders")
    session.save(tmp_path / "saved")
    assert session.runs().records[0].saved == {"sql": str(tmp_path / "saved")}
    session.train(model, rows(), output_dir=str(tmp_path / "out"), **ARGUMENTS | {"max_steps": 1})
    assert session.runs().records[0].saved == {"orders": str(tmp_path / "out" / "orders")}


def test_a_resumed_run_is_saved_nowhere(broken: Path) -> None:
    RunStore(broken).mark_saved(RunStore(broken).records()[0].id, "sql", broken)
    assert RunStore(broken).records()[0].saved == {"sql": str(broken)}
    resumed(broken)
    assert RunStore(broken).records()[0].saved == RunStore(broken).records()[0].saved_files == {}


def test_a_state_stays_when_another_adapter_is_saved_over_the_copy(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path / "runs")
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    session.save(tmp_path / "out", adapter="sql")
    session.add(model, LORA, name="other")
    session.use("other")
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    session.save(tmp_path / "out", adapter="other", replace=True)
    store = RunStore(tmp_path / "runs")
    kept = {record.name: record.kept_steps for record in store.records()}
    assert len(kept) == 2 and kept["sql-1"] == (1,)
    store.tidy(most_bytes=0)
    assert {record.name: record.kept_steps for record in store.records()} == kept


def test_what_is_deleted_is_said_when_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunStore.tidy, "__kwdefaults__", {"most_runs": 2, "most_bytes": 10**9})
    session, model = adapted_session(tmp_path / "runs")
    results = []
    for number in range(4):
        results.append(session.train(model, rows(), **ARGUMENTS | {"max_steps": 1}))
        if number < 2:
            session.save(tmp_path / f"saved-{number}")
    assert ["deleted" in str(result) for result in results] == [False, False, True, True]
    assert "more than 2 runs were kept: deleted 'sql-2'" in str(results[3])
    assert [record.name for record in session.runs().records] == ["sql-4", "sql-3"]
    assert "deleted 'sql-2'" in session.runs().records[0].message


def test_another_folder_for_runs(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path / "first")
    assert session.runs_folder() == tmp_path / "first"
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    assert session.runs_folder(tmp_path / "drive") == tmp_path / "drive" and not (tmp_path / "drive").exists()
    assert str(session.runs()) == f"there is no run in {tmp_path / 'drive'} yet"
    folder = session.train(model, rows(), **ARGUMENTS | {"max_steps": 1}).state.folder
    assert folder == str(tmp_path / "drive" / "sql-1")
    assert [session.runs_folder(word) for word in ("off", "")] == [None, None]
    assert session.train(model, rows(), **ARGUMENTS | {"max_steps": 1}).state.folder == ""
    assert session.runs_folder(str(tmp_path / "first")) == tmp_path / "first"
    assert str(session.runs()).startswith("1 run in")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("{}/not mounted/runs", r"there is no folder .*not mounted for 'runs': mount or create it first"),
        ("{}/file", r"file is not a folder, so runs cannot be saved in .*file"),
        ("{}/file/runs", r"file is not a folder, so runs cannot be saved in .*runs"),
        ("a\0b", "is not a path"),
        (3, "runs_folder needs a folder, not 3"),
    ],
)
def test_a_folder_that_cannot_have_runs_is_refused(folder: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    session, _ = adapted_session(tmp_path / "first")
    with pytest.raises(NbpeftError, match=message):
        session.runs_folder(folder.format(tmp_path) if isinstance(folder, str) else folder)
    assert session.runs_folder() == tmp_path / "first"


def test_the_folder_stays_while_a_training_runs(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path / "first")
    refused: list[str] = []

    def change(state: Any) -> None:
        if not refused and session.context.runs:
            with pytest.raises(BusyError) as error:
                session.runs_folder(tmp_path)
            refused.append(error.value.message)

    session.subscribe(change)
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    assert refused == [f"training sql is running and is saved in {tmp_path / 'first'}: wait or stop it"]
    assert session.runs_folder(tmp_path) == tmp_path


def test_runs_are_kept_on_a_drive_without_locks_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a drive that is mounted over a network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    for name in ("link", "symlink", "chmod", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    session, model = adapted_session(tmp_path / "drive")
    state = session.train(model, rows(), **ARGUMENTS | {"max_steps": 3}).state
    assert state.folder == str(tmp_path / "drive" / "sql-1")
    (record,) = session.runs().records
    assert record.status == "finished" and record.step == 3
    assert session.resume("sql-1", data=rows(), model=llama(), variable="model").training is None
