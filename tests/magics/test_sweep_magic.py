"""Sweeps in cells: ``learning_rate = sweep(1e-4, 3e-4)`` and ``r = sweep(8, 64)``."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback

from nbpeft.training import SweepResult
from tests.magics.notebook import Notebook
from tests.runs.killed import when_noted

TRAIN = """%%lora_train model --data rows --eval-data held_out
max_steps = 2
per_device_train_batch_size = 2
learning_rate = sweep(0.01, 0.05)"""


@pytest.fixture
def ready(adapted: Notebook) -> Any:
    rows = [{"input_ids": [1 + (step + start) % 7 for step in range(6)]} for start in range(8)]
    adapted["rows"], adapted["held_out"] = rows[:6], rows[6:]
    return adapted


def weights(notebook: Notebook, name: str) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in notebook["model"].manager.parameters(name)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_training_cell_trains_an_adapter_for_each_value(ready: Notebook) -> None:
    before = weights(ready, "sql")
    result = ready.do(TRAIN)
    assert isinstance(result, SweepResult)
    assert [member.name for member in result.members] == ["sql-lr1e-2", "sql-lr5e-2"]
    assert ready["model"].manager.names == ("chat", "sql", "sql-lr1e-2", "sql-lr5e-2")
    assert ready["model"].active_adapters == [result.best]
    assert same(weights(ready, "sql"), before)
    assert not same(weights(ready, "sql-lr1e-2"), before)


def test_a_cell_stops_the_worse_half(ready: Notebook) -> None:
    result = ready.do(TRAIN.replace("held_out", "held_out --halving").replace("max_steps = 2", "max_steps = 4"))
    assert sorted(member.step for member in result.members) == [2, 4]
    line = ready.run("%lora add model --name codes r=sweep(2,4,halving=True)").line
    assert "r: adapters are only added here; give --halving to their training" in line


def test_the_cell_run_again_gives_the_same_comparison(ready: Notebook, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("NBPEFT_RUNS", str(tmp_path))
    first = ready.do(TRAIN)
    once = {member.name: weights(ready, member.name) for member in first.members}
    again = ready.do(TRAIN)
    assert [member.history for member in again.members] == [member.history for member in first.members]
    assert all(same(weights(ready, name), kept) for name, kept in once.items())
    assert "replaces sql-lr1e-2, sql-lr5e-2 of run sql-sweep-1, trained and not saved" in again.state.message
    assert "each adapter starts as a copy of 'sql'" in str(again)
    other = ready.do(TRAIN.replace("0.05)", "0.02)"))
    assert other.members[0].history == first.members[0].history
    assert "replaces sql-lr1e-2 of run sql-sweep-2" in other.state.message
    assert same(weights(ready, "sql-lr5e-2"), once["sql-lr5e-2"])


def test_what_a_sweep_replaces_is_restored_by_undo(ready: Notebook) -> None:
    ready.do(TRAIN)
    once = weights(ready, "sql-lr1e-2")
    ready.do(TRAIN.replace("max_steps = 2", "max_steps = 3"))
    assert not same(weights(ready, "sql-lr1e-2"), once)
    assert "rename that one first" in ready.run("%lora undo").line
    for name in ("sql-lr1e-2", "sql-lr5e-2"):
        ready.do(f"%lora rename {name} {name}-longer")
        ready.do("%lora undo") if name == "sql-lr5e-2" else None
    ready.do("%lora undo")
    assert same(weights(ready, "sql-lr1e-2"), once)
    assert "a copy of 'sql'" in str(ready.do(TRAIN))


def test_a_sweep_that_cannot_begin_leaves_the_former_one(ready: Notebook) -> None:
    result = ready.do(TRAIN)
    once = {member.name: weights(ready, member.name) for member in result.members}
    assert ready.run(f"{TRAIN}\noptim = 'adam'").error is not None
    assert ready.run(TRAIN.replace("--data rows", "--data rows[:0]")).error is not None
    assert all(same(weights(ready, name), kept) for name, kept in once.items())
    assert ready["model"].active_adapters == [result.best]
    assert "nothing to undo" in ready.run("%lora undo").line


def test_others_with_the_names_of_a_sweep_are_refused(ready: Notebook) -> None:
    ready.do("%lora copy sql sql-lr1e-2")
    line = ready.run(TRAIN).line
    assert "'sql-lr1e-2' exists already, and a sweep makes its adapters anew: delete or rename it first" in line
    ready.do("%lora delete sql-lr1e-2")
    ready.do(TRAIN)
    ready.do("%lora freeze sql-lr1e-2")
    assert "'sql-lr1e-2' exists already" in ready.run(TRAIN).line


def test_an_adapter_that_got_the_name_of_a_former_one_is_not_replaced(ready: Notebook) -> None:
    ready.do(TRAIN)
    ready.do("%lora delete sql-lr1e-2")
    ready.do("%lora copy chat sql-lr1e-2")
    kept = weights(ready, "sql-lr1e-2")
    assert "'sql-lr1e-2' exists already" in ready.run(TRAIN).line
    assert same(weights(ready, "sql-lr1e-2"), kept)


def test_while_an_adapter_is_merged_a_sweep_or_a_restart_is_refused_and_changes_nothing(ready: Notebook) -> None:
    ready.do(TRAIN)
    ready.do("%lora use sql-lr5e-2")
    ready.do("%lora merge")
    names = ready["model"].manager.names
    before = {name: weights(ready, name) for name in names}
    restart = "%%lora_train model --data chat=rows sql-lr5e-2=rows --restart\nmax_steps = 1"
    assert "'sql-lr5e-2' merged: unmerge before a sweep" in ready.run(TRAIN).line
    assert "'sql-lr5e-2' merged: unmerge before weights are replaced" in ready.run(restart).line
    assert ready["model"].manager.names == names
    assert all(same(weights(ready, name), kept) for name, kept in before.items())


def test_a_sweep_of_an_adapter_that_was_trained_says_so_and_counts_its_steps(
    ready: Notebook, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("NBPEFT_RUNS", str(tmp_path))
    ready.do(TRAIN.replace("sweep(0.01, 0.05)", "0.01"))
    result = ready.do(TRAIN)
    assert "continues from the weights after step 2 of run sql-1" in result.state.message
    tracked = ready.session.context.models.get("model")
    for adapter, run in (("sql-lr1e-2", "sql-sweep-1"), ("sql", "sql-1")):
        steps, run_id = tracked.steps_of([adapter])
        assert (steps, ready.session.context.run_name(run_id)) == (2, run)
    assert "continues" not in ready.do(TRAIN.replace("learning_rate", "r").replace("0.01, 0.05", "2, 8")).state.message


def test_restart_begins_with_the_initial_weights_of_an_adapter_that_stays_as_it_is(ready: Notebook) -> None:
    fresh = ready.do(TRAIN)
    ready.do(TRAIN.replace("sweep(0.01, 0.05)", "0.01").replace("--data", "--adapter sql --data"))
    before = weights(ready, "sql")
    result = ready.do(TRAIN.replace("held_out", "held_out --restart"))
    assert same(weights(ready, "sql"), before)
    assert [member.history for member in result.members] == [member.history for member in fresh.members]
    assert "each adapter starts from the initial weights of 'sql', which itself is not changed" in str(result)
    assert "continues from" not in result.state.message


def test_restart_of_a_loaded_adapter_says_that_its_initial_weights_are_unknown(ready: Notebook, tmp_path: Path) -> None:
    ready.do(f"%lora save {tmp_path}")
    ready.do(f"%lora load {tmp_path}/sql --name loaded --trainable")
    ready.do("%lora use loaded")
    result = ready.do(TRAIN.replace("held_out", "held_out --restart"))
    assert "each adapter starts from new weights: the initial ones of 'loaded' are unknown" in str(result)


def test_restart_on_rows_of_their_own_resets_these_adapters_alone(ready: Notebook) -> None:
    ready.do("%lora copy sql third")
    before = {name: weights(ready, name) for name in ("sql", "third")}
    ready.do("%lora use third")
    cell = "%%lora_train model --data sql=rows chat=rows[:2] {}\nmax_steps = 1"
    first = ready.do(cell.format("")).members
    assert [member.history for member in ready.do(cell.format("--restart")).members] == [one.history for one in first]
    assert same(weights(ready, "third"), before["third"])
    assert not same(weights(ready, "sql"), before["sql"])


def test_an_adapter_cell_makes_several_that_train_together(ready: Notebook) -> None:
    added = ready.do("%%lora model --name codes\nr = sweep(2, 4)\ntarget_modules = 'q_proj'")
    assert [item.name for item in (added.adapter, *added.others)] == ["codes-r2", "codes-r4"]
    assert ready["model"].active_adapters == ["codes-r2"]
    assert "side by side" in str(added)
    result = ready.do("%%lora_train model --data rows\nmax_steps = 1")
    assert [member.name for member in result.members] == ["codes-r2", "codes-r4"]
    assert ready.do("%%lora_train model --data rows\nmax_steps = 1").adapter == result.best


def test_a_bare_model_takes_a_sweep(notebook: Notebook) -> None:
    notebook.do("%lora add model --name codes r=sweep(2,4) target_modules=q_proj")
    assert notebook["model"].manager.names == ("codes-r2", "codes-r4")


@pytest.mark.slow
def test_a_dry_run_and_a_plan_count_all(ready: Notebook) -> None:
    preview = ready.do("%%lora model --name codes --dry-run --batch-size 2 --max-length 16\nr = sweep(2, 4)")
    assert "2 adapters, to be trained side by side" in str(preview)
    assert "2 adapters side by side" in str(preview.memory.settings)
    plans = [
        ready.do(f"%lora plan model --batch-size 2 --max-length 16 {more}")
        for more in ("", "--num-adapters 3", "r=sweep(2,4)")
    ]
    one, three, two = ({part.name: part.byte_count for part in plan.parts} for plan in plans)
    assert three["adapters"] == 3 * one["adapters"]
    assert two["optimizer"] == 2 * one["optimizer"]
    assert three["base weights"] == one["base weights"]


def test_a_sweep_is_completed(ready: Notebook) -> None:
    assert "sweep(" in ready.complete("%%lora_train model --data rows\nlearning_rate = sw")
    assert "sweep(" in ready.complete("%%lora model\nuse_dora = s")


def test_an_adapter_is_cloned_while_a_sweep_runs_in_the_background(ready: Notebook) -> None:
    cloned = threading.Event()

    class Wait(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert state.global_step != 1 or cloned.wait(60)

    clone = "%lora clone sql-lr1e-2 --name slow learning_rate=0.001"
    assert ready.run(clone).line == "no training is running: there is nothing to clone"
    ready["waiting"] = [Wait()]
    cell = TRAIN.replace("--eval-data held_out", "--background").replace("max_steps = 2", "max_steps = 3")
    ready.do(f"{cell}\ncallbacks = waiting")
    assert (
        "num_train_epochs cannot be a sweep"
        in ready.run(clone.replace("learning_rate=0.001", "num_train_epochs=2")).line
    )
    assert "sql-lr1e-2 is cloned after this step as slow" in str(ready.do(clone))
    cloned.set()
    ready.session.context.background[ready.session.context.models.get("model")].join(60)
    assert [member.name for member in ready.do("%lora watch --wait").members] == ["sql-lr1e-2", "sql-lr5e-2", "slow"]


@pytest.mark.slow
def test_a_sweep_that_was_broken_off_goes_on(ready: Notebook, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("NBPEFT_RUNS", str(tmp_path))
    ready["held"] = ready["model"].manager
    ready.do(TRAIN.replace("max_steps = 2", "max_steps = 4"))
    whole = {name: weights(ready, name) for name in ("sql-lr1e-2", "sql-lr5e-2")}
    for name in whole:
        ready["held"].activate("sql")
        ready["held"].remove(name)

    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    ready["broken"] = [Break()]
    ready.run(TRAIN.replace("max_steps = 2", "max_steps = 4\ncallbacks = broken"))
    rows = {"data": ready["rows"], "eval_data": ready["held_out"], "callbacks": []}
    result = ready.session.resume("sql-sweep-2", model="model", **rows)
    assert [member.name for member in result.training.members] == list(whole)
    for name, tensors in whole.items():
        assert same(weights(ready, name), tensors)


def test_a_script_is_written_with_the_best(ready: Notebook, tmp_path: Any) -> None:
    result = ready.do(TRAIN)
    ready.do(f"%lora export {tmp_path}/train.py --base here/base")
    rate = re.escape(str(result.best_fields["learning_rate"]))
    assert re.search(rf"learning_rate\W+{rate}\W", (tmp_path / "train.py").read_text())


@pytest.mark.drawn(4)
@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (TRAIN.replace("sweep(0.01, 0.05)", "sweep(0.01)"), "line 3: a sweep has at least two values"),
        (TRAIN.replace("sweep(0.01, 0.05)", "sweep([0.01, 0.05])"), "line 3: sweep takes the values one by one"),
        (TRAIN.replace("sweep(0.01, 0.05)", "sweep(0.01, 0.01)"), "line 3: the sweep has 0.01 twice"),
        (TRAIN.replace("max_steps = 2", "max_steps = sweep(2, 3)"), "line 1: max_steps cannot be a sweep"),
        (TRAIN.replace("0.05)", "-1.0)"), "line 3: learning_rate must be at least 0"),
        (TRAIN + "\nr = sweep(*range(1, 10))", "line 4: the sweep has 18 combinations"),
        (
            TRAIN + "\neval_strategy = 'steps'\nlr_scheduler_type = sweep('linear', 'reduce_lr_on_plateau')",
            "depends on a single loss",
        ),
        ("%%lora model --name new\nr = sweep(0, 4)", "line 1: "),
        ("%%lora model --name new\nr = sweep(2, 4)\ntarget_modules = ['nothing']", "nothing"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(ready: Notebook, cell: str, words: str) -> None:
    names = ready["model"].manager.names
    assert words in ready.run(cell).line
    assert ready["model"].manager.names == names
    assert ready["model"].active_adapters == ["sql"]


def test_a_sweep_of_the_bits_of_a_base_is_refused(notebook: Notebook) -> None:
    assert "sweep" in notebook.run("%%qlora model\nbits = sweep(4, 8)").line


def test_adapters_are_trained_on_rows_of_their_own(ready: Notebook, tmp_path: Path) -> None:
    before = {name: weights(ready, name) for name in ("sql", "chat")}
    fields = "num_train_epochs = 1\nper_device_train_batch_size = 2"
    result = ready.do(
        f"%%lora_train model --data sql=rows chat=rows[:2] --eval-data sql=held_out chat=held_out\n{fields}"
    )
    assert [(member.name, member.step) for member in result.members] == [("sql", 3), ("chat", 1)]
    assert ready["model"].active_adapters == ["sql"]
    assert not any(same(weights(ready, name), kept) for name, kept in before.items())
    called = ready.session.context.models.get("model").training_call
    assert called.data == "sql: 6 rows with input_ids; chat: 2 rows with input_ids"
    ready.do(f"%lora export {tmp_path}/train.py --base some/base")
    script = (tmp_path / "train.py").read_text()
    assert "sql" in script and "chat" not in script
    words = "data has rows for 'chta', which the model does not have (adapters: 'chat', 'sql'). Did you mean 'chat'?"
    assert words in ready.run(f"%%lora_train model --data sql=rows chta=rows\n{fields}").line


def test_a_resumed_cell_finds_the_rows_of_each_adapter(ready: Notebook) -> None:
    ready["few"] = ready["rows"][:3]
    end = ready.session.on_run(lambda run, name: when_noted(run, 1, lambda: run.control.request_stop("enough")))
    fields = "num_train_epochs = 2\nper_device_train_batch_size = 2"
    stopped = ready.do(f"%%lora_train model --data sql=rows chat=few\n{fields}")
    end()
    assert stopped.status == "stopped"
    result = ready.do("%lora resume").training
    assert [(member.name, member.step) for member in result.members] == [("sql", 6), ("chat", 4)]


def test_a_run_on_rows_of_each_is_named_by_its_adapters_and_asks_for_the_rows_of_each(
    ready: Notebook, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("NBPEFT_RUNS", str(tmp_path))
    ready["few"] = ready["rows"][:3]
    end = ready.session.on_run(lambda run, name: when_noted(run, 1, lambda: run.control.request_stop("enough")))
    ready.do("%%lora_train model --data sql=rows chat=few --eval-data sql=held_out chat=few\nnum_train_epochs = 4")
    end()
    del ready.shell.user_ns["few"]
    line = ready.run("%lora resume").line
    assert (
        "%lora resume sql+chat-1 --data sql=DATA chat=DATA --eval-data sql=DATA chat=DATA (not defined here: few)"
        in line
    )
    line = ready.run("%lora resume --data rows --eval-data rows").line
    assert line == "run sql+chat-1 trained each adapter on rows of its own: pass --data sql=DATA chat=DATA"
    line = ready.run("%lora resume --data sql=rows --eval-data sql=rows").line
    assert line == "--data has rows for 'sql', but the adapters to train are 'sql', 'chat'"
    resumed = ready.do("%lora resume --data sql=rows chat=rows[:3] --eval-data sql=held_out chat=rows[:3]")
    assert [member.name for member in resumed.training.members] == ["sql", "chat"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--data rows --halving", "--halving has no effect without a sweep: pass --patience to stop early"),
        ("--data sql=rows chat=rows --halving", "--halving compares adapters, but each has rows of its own"),
        ("--data rows --eval-data 100", "--eval-data 100 holds out 100 of 6 rows"),
        ("--data rows --patience 2", "--patience needs evaluation data: pass --eval-data or --score"),
        ("--data rows --eval-by x", "give their share or number (--eval-data 0.1)"),
        ("--data sql=rows chat=rows --eval-data sql=rows", "but the evaluation rows are those of 'sql'"),
        ("--data chta=rows", "no adapter is called 'chta' (adapters: 'chat', 'sql'). Did you mean 'chat'?"),
        ("--data other=rows", "--data: no adapter is called 'other' (adapters: 'chat', 'sql')"),
        ("--data year=2024/x.jsonl", "there is no file 'year=2024/x.jsonl', and none '2024/x.jsonl' for an adapter"),
        ("--data splits", "data is a DatasetDict: 'sql', 'test' are its splits, not adapters; pass one of them"),
        ("--data sql=rows chat=rows --eval-data splits", "--eval-data is a DatasetDict"),
    ],
)
def test_mistakes_about_rows_and_evaluations_are_told_in_words_of_cells(
    ready: Notebook, options: str, words: str
) -> None:
    rows = Dataset.from_list(ready["rows"])
    ready["splits"] = DatasetDict(sql=rows, test=rows)
    assert words in ready.run(f"%%lora_train model {options}\nmax_steps = 1").line


def test_stop_half_needs_evaluations(ready: Notebook) -> None:
    line = ready.run(TRAIN.replace("--eval-data held_out", "--halving")).line
    assert "--halving needs evaluations: pass --eval-data or --score" in line


def test_the_rows_of_one_adapter_are_shown(ready: Notebook) -> None:
    assert ready.run("%lora data sql=rows").line == "data: rows for each adapter are shown one by one: %lora data rows"


def test_fields_for_each_are_given_as_the_message_says(ready: Notebook) -> None:
    cell = "%%lora_train model --data sql=rows chat=rows\nmax_steps = 1\n"
    line = ready.run(f"{cell}learning_rate = sweep(0.1, 0.2)").line
    assert "give each its value with the line members = {'sql': {'learning_rate': …}, …}" in line
    result = ready.do(cell + "members = {'sql': {'learning_rate': 0.01}, 'chat': {}}")
    assert result.members[0].settings == {"learning_rate": "0.01"}
