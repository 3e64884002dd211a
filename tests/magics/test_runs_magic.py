"""``%lora resume``, ``%lora runs``, ``--restart``, ``--no-keep`` and ``--track`` in a real shell."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from nbpeft.display.next_steps import next_steps
from nbpeft.session import get_session
from nbpeft.training.monitor import run_checkpointer
from tests.char_tokenizer import CharTokenizer
from tests.faults.killing import die, forked
from tests.magics.notebook import Notebook
from tests.runs.killed import when_noted
from tests.tiny_models import llama

CELL = """%%lora_train model --data rows --eval-data held --tokenizer tok --max-length 12
max_steps = 6
per_device_train_batch_size = batch
learning_rate = 0.05  # high"""
TOKEN = "hf_" + "aB3d" * 8


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NBPEFT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def prepare(notebook: Notebook, *, adapter: bool = True) -> Notebook:
    """What the cells above the training do."""
    notebook["model"], notebook["tok"], notebook["batch"] = llama(), CharTokenizer(), 2
    rows = [{"prompt": f"{number} and", "completion": f" {number + 1}"} for number in range(8)]
    notebook["rows"], notebook["held"] = rows, rows[:2]
    if adapter:
        torch.manual_seed(3)
        notebook.do("%%lora model --name sql\nr = 4\nlora_dropout = 0.1\ntarget_modules = ['q_proj', 'v_proj']")
    return notebook


def killed(step: int, cell: str = CELL) -> None:
    """A kernel that is killed while the cell runs."""

    def act() -> None:
        run_checkpointer.SHORTEST, run_checkpointer.SHARE = 0.0, 1e9
        notebook = prepare(Notebook())
        notebook.session.on_run(lambda run, name: when_noted(run, step, die))
        notebook.run(cell)

    assert forked(act)


def test_a_new_kernel_goes_on_where_the_last_was_killed(bare: Notebook, place: Path) -> None:
    killed(4)
    fresh = prepare(bare, adapter=False)
    result = fresh.do("%lora resume")
    assert (result.run, result.step, result.training.steps) == ("sql-1", 3, 6)
    assert fresh["model"].manager.active == ("sql",)
    through = prepare(fresh).do(CELL)
    assert through.state.history == result.training.state.history
    assert through.eval_loss == result.training.eval_loss
    assert "sql-1" in str(fresh.do("%lora runs"))


def test_slices_of_lists_are_found_again(bare: Notebook, place: Path) -> None:
    killed(4, CELL.replace("--data rows --eval-data held", "--data rows[:-2] --eval-data rows[6:]"))
    source = json.loads((place / "sql-1" / "run.json").read_text())["source"]
    assert (source["data"], source["eval_data"]) == ("rows[:-2]", "rows[6:]")
    fresh = prepare(bare, adapter=False)
    del fresh.shell.user_ns["rows"]
    assert "pass them again: %lora resume sql-1 --data DATA" in fresh.run("%lora resume").line
    result = prepare(fresh, adapter=False).do("%lora resume")
    assert (result.step, result.training.steps) == (3, 6)


def test_the_card_of_a_run_is_shown_without_its_kernel(
    bare: Notebook, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(4)
    crashed = bare.do("%lora watch")
    page = crashed._repr_html_()
    assert "✖ crashed at step 4 of 6: its process ended" in page and ">stopped</span>" in page
    assert "Resume</span>" in page and "%lora resume sql-1" in page and "4 / 6" in page
    assert len(crashed.train.history) == 4 and crashed.train.series["learning rate"]
    trained = prepare(bare).do(CELL)
    bare.do(f'%lora save "{tmp_path / "saved"}" --adapter sql')
    bare.do("%unload_ext nbpeft")
    bare.do("%load_ext nbpeft")
    ended = bare.do("%lora watch sql-2")
    assert ended.train.history == trained.state.history and ended.train.eval_loss == trained.eval_loss
    page = ended._repr_html_()
    assert "✓ saved" in page and f"%lora load {tmp_path / 'saved'} --name sql" in page
    monkeypatch.chdir(tmp_path)
    assert "%lora load saved --name sql" in bare.do("%lora watch sql-2")._repr_html_()
    assert str(ended).startswith("training sql finished: step 6/6")
    assert bare.run("%lora watch sql-9").line.startswith("no run is called 'sql-9'")


def test_without_any_run_there_is_no_card(bare: Notebook) -> None:
    for line in ("%lora watch", "%lora watch --wait"):
        assert "no training ran in this session, and" in bare.run(line).line


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("del rows", "values that its folder does not store; pass them again: %lora resume sql-1 --data DATA"),
        ("del held", "values that its folder does not store; pass them again: %lora resume sql-1 --eval-data DATA"),
        ("del rows, held", "pass them again: %lora resume sql-1 --data DATA --eval-data DATA"),
        ("rows = rows[:5]", "run sql-1 was trained with 8 rows, but 5 are given"),
        ("del model", "run sql-1 is of the model 'model' (another one: --model), but no variable is called 'model'."),
        ("model = 3", "run sql-1 is of the model 'model' (another one: --model), but 'model' is an int, not a model."),
    ],
)
def test_what_is_missing_in_the_new_kernel_is_one_line(bare: Notebook, change: str, told: str) -> None:
    killed(2)
    prepare(bare, adapter=False).do(change)
    assert told in bare.run("%lora resume sql-1").line
    assert (
        bare.run("%lora resume sql-1 variable=x").line
        == "variable is an option of the magic's line, not a field of the cell"
    )
    assert not hasattr(bare.shell.user_ns.get("model"), "peft_config")


@pytest.mark.parametrize("given", ["--background", "background=True"])
def test_a_resumed_training_runs_in_the_foreground(bare: Notebook, given: str) -> None:
    assert bare.run(f"%lora resume {given}").line == (
        "%lora resume takes no background: a resumed training runs in the foreground"
    )


def test_fields_for_a_run_that_had_finished_are_refused(bare: Notebook) -> None:
    prepare(bare).do(CELL)
    for given, told in (
        ("max_steps=9", "max_steps=… cannot be used: run sql-1 had finished and has no state to continue."),
        ("max_stepz=9", "Did you mean 'max_steps'?"),
    ):
        line = bare.run(f"%lora resume sql-1 {given}").line
        assert told in line and "session." not in line
    assert "%%lora_train trains further" in bare.run("%lora resume sql-1 max_steps=9").line


def test_values_of_the_cell_are_kept_and_not_their_expressions(bare: Notebook, place: Path) -> None:
    cell = CELL.replace("--data rows --eval-data held", "--data data['train'] --eval-data 0.25").replace(
        "= batch", "= batch * 1"
    )

    def act() -> None:
        run_checkpointer.SHORTEST, run_checkpointer.SHARE = 0.0, 1e9
        notebook = prepare(Notebook())
        notebook["data"] = {"train": notebook["rows"]}
        notebook.session.on_run(lambda run, name: when_noted(run, 3, die))
        notebook.run(cell)

    assert forked(act)
    facts = json.loads((place / "sql-1" / "run.json").read_text())
    assert facts["arguments"]["per_device_train_batch_size"] == 2
    assert {"eval_data": "0.25", "tokenizer": "tok"}.items() <= facts["source"].items()
    assert "data" not in facts["source"], "an expression names nothing"
    fresh = prepare(bare, adapter=False)
    del fresh.shell.user_ns["batch"]
    assert fresh.run("%lora resume").line.endswith("pass them again: %lora resume sql-1 --data DATA")
    assert fresh.do("%lora resume --data rows[:]").training.steps == 6


def test_objects_are_named_and_given_again(bare: Notebook, place: Path) -> None:
    prepare(bare).do(
        "from transformers import TrainerCallback\nfrom nbpeft.training import Trainer\n"
        "class Mine(Trainer):\n    made = []\n    def __init__(self, *args, **more):\n"
        "        super().__init__(*args, **more)\n        self.made.append(1)\nown = [TrainerCallback()]"
    )
    bare.session.on_run(lambda run, name: run.control.request_stop())
    bare.do(CELL.replace("--max-length", "--trainer-class Mine --patience 3 --max-length") + "\ncallbacks = own")
    facts = json.loads((place / "sql-1" / "run.json").read_text())
    assert facts["objects"] == ["callbacks", "trainer_class"] and facts["arguments"]["patience"] == 3
    told = "run sql-1 used values that its folder does not store; pass them again: %lora resume sql-1 "
    assert bare.run("%lora resume").line == f"{told}callbacks={{callbacks}} --trainer-class CLASS"
    bare.do("%lora resume sql-1 --trainer-class Mine callbacks={own}")
    assert bare["Mine"].made == [1, 1]


def test_rewards_are_found_by_their_names_if_cells_define_them(bare: Notebook, place: Path) -> None:
    define = "def short(completions, **_):\n    return [-float(len(text)) for text in completions]"
    prepare(bare).do(f"{define}\nasked = [{{'prompt': row['prompt']}} for row in rows]\nmore = short")
    bare.session.on_run(lambda run, name: run.control.request_stop())
    cell = "%%lora_train model --data asked --tokenizer tok --reward short --reward more\nmax_steps = 3\n"
    bare.do(f"{cell}max_completion_length = 4\nnum_generations = 2\nper_device_train_batch_size = 2")
    assert json.loads((place / "sql-1" / "run.json").read_text())["source"]["reward"] == "short more"
    told = "pass them again: %lora resume sql-1 --reward FUNCTION"
    bare.do("del more, short")
    assert bare.run("%lora resume").line.endswith(f"{told} (not defined here: short, more)")
    bare.do("from os import system as short\nmore = short")  # not a function that a cell defines
    assert bare.run("%lora resume").line.endswith(told)
    bare.do(f"{define}\nmore = short")
    assert str(bare.do("%lora resume")).startswith("resumed sql-1 at step 0")


def test_a_model_of_another_name_is_given(bare: Notebook) -> None:
    killed(2)
    prepare(bare, adapter=False).do("base = model; del model")
    assert bare.do("%lora resume --model base").training.steps == 6
    assert bare["base"].manager.names == ("sql",)


def test_a_run_of_a_script_says_how_it_goes_on(bare: Notebook) -> None:
    prepare(bare)
    bare.session.on_run(lambda run, name: run.control.request_stop())
    bare.session.train(bare["model"], bare["rows"], tokenizer=bare["tok"], max_steps=4)
    told = bare.run("%lora resume").line
    assert (
        told == "run sql-1 used values that its folder does not store; pass them again: %lora resume sql-1 --data DATA"
    )
    assert bare.do("%lora resume --data rows").training.steps > 0


def test_running_a_cell_again_and_restarting_it(bare: Notebook) -> None:
    prepare(bare)
    first = bare.do(CELL)
    second = bare.do(CELL)
    assert "continues from the weights after step 6 of run sql-1 (new learning-rate schedule)" in str(second)
    assert second.state.first_step == 0 and second.state.history != first.state.history
    third = bare.do(CELL.replace("--max-length", "--restart --max-length"))
    assert third.state.history == first.state.history and "goes on" not in str(third)


def test_runs_are_listed_sorted_compared_renamed_and_deleted(bare: Notebook, place: Path) -> None:
    prepare(bare)
    bare.do(CELL)
    bare.do(CELL.replace("0.05", "0.01"))
    assert [record.name for record in bare.do("%lora runs").records] == ["sql-2", "sql-1"]
    assert [record.name for record in bare.do("%lora runs --sort name").records] == ["sql-1", "sql-2"]
    assert "cannot be sorted by 'resul'. Did you mean 'result'" in bare.run("%lora runs --sort resul").line
    compared = bare.do("%lora runs sql-1 sql-2")
    assert compared.differing["learning_rate"] == (0.05, 0.01)
    assert "Did you mean 'sql-1'" in bare.run("%lora runs sql-1 sql1").line
    bare.do('%lora runs --note sql-1 "a low rate"')
    assert [record.name for record in bare.do("%lora runs --search low").records] == ["sql-1"]
    assert "a low rate" in str(bare.do("%lora runs sql-1 sql-2"))
    bare.do("%lora runs --note sql-1 '-10% lr'")
    assert bare.do("%lora runs --sort name").records[0].note == "-10% lr"
    for line, told in (
        ("--rename sql-1 slow --delete sql-2", "--delete is used alone: leave out --rename"),
        (
            "sql-2 --note sql-1 x --sort name",
            "--note is used alone: leave out --sort, runs to compare",
        ),
        ("--note sql-1 -10 % lr", "leave out runs to compare (a text of several words is put in quotes)"),
        (
            "--note sql-1 -10% lr",
            '--note: expected 2 arguments. A value that begins with a dash is put in quotes: "-10%"',
        ),
        ("sql-2 --folder elsewhere", "--folder is used alone: leave out runs to compare"),
        ("sql-1 sql-2 --sort name", "sort is for the list of all runs"),
    ):
        assert told in bare.run(f"%lora runs {line}").line
    bare.do("%lora runs --rename sql-1 slow")
    assert "no run is called 'slo'" in bare.run("%lora runs --delete slo").line
    bare.do("%lora runs --delete slow")
    assert sorted(path.name for path in place.iterdir()) == [".gitignore", "sql-2"]


def test_where_and_whether_runs_are_kept(bare: Notebook, place: Path, tmp_path: Path) -> None:
    prepare(bare)
    bare.do(CELL.replace("--max-length", "--no-keep --max-length"))
    assert not place.exists()
    bare.do(f"%config NbpeftMagics.runs_folder = '{tmp_path}/mine'")
    assert bare.do(CELL).state.folder == f"{tmp_path}/mine/sql-1"
    bare.do("%config NbpeftMagics.runs_folder = ''")
    assert bare.do(CELL).state.folder == ""
    assert "is disabled" in bare.run("%lora runs").line


def test_no_token_of_a_cell_is_kept(bare: Notebook, place: Path) -> None:
    prepare(bare)
    bare.do(f"{CELL}\nhub_token = 'a password'\nrun_name = {TOKEN!r}")
    bare.do(f"%lora_train model --data rows --tokenizer tok max_steps=1 hub_token=other run_name={TOKEN}")
    text = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert TOKEN.encode() not in text and b"a password" not in text and b"other" not in text
    source = json.loads((place / "sql-1" / "run.json").read_text())["source"]
    assert source["cell"].splitlines() == [
        "max_steps = 6",
        "per_device_train_batch_size = batch",
        "learning_rate = 0.05",
    ]


def test_tracking_by_a_word(bare: Notebook) -> None:
    prepare(bare)
    result = bare.do(CELL.replace("--max-length", "--track tensorboard --max-length"))
    assert list(Path(result.state.folder).glob("tensorboard/events*"))
    assert "invalid choice: 'wandbb'" in bare.run(CELL.replace("--max-length", "--track wandbb --max-length")).line


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_one_line(
    bare: Notebook, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbpeft.training.watching import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda module: None)
    prepare(bare)
    told = f"needs a package that is not installed: pip install {name}"
    assert told in bare.run(CELL.replace("--max-length", f"--track {name} --max-length")).line
    assert told in bare.run(f"{CELL}\nreport_to = '{name}'").line


def test_completion_offers_columns_and_runs(bare: Notebook) -> None:
    assert "result" in bare.complete("%lora runs --sort re")
    prepare(bare).do(CELL)
    assert [bare.complete(line) for line in ("%lora resume s", "%lora runs sql", "%lora runs --delete s")] == [
        ["sql-1"]
    ] * 3
    assert {"runs", "resume"} <= set(bare.complete("%lora r"))


def test_an_interrupted_cell_can_go_on(bare: Notebook) -> None:
    prepare(bare)
    interrupt = functools.partial(os.kill, os.getpid(), signal.SIGINT)
    end = bare.session.on_run(lambda run, name: when_noted(run, 3, interrupt))
    bare.run(CELL)
    end()
    assert [record.status for record in bare.do("%lora runs").records] == ["stopped"]
    assert bare.do("%lora resume").step == 3


def test_interrupting_a_resumed_run_leaves_the_adapted_model(bare: Notebook) -> None:
    killed(3)
    fresh = prepare(bare, adapter=False)
    interrupt = functools.partial(os.kill, os.getpid(), signal.SIGINT)
    end = fresh.session.on_run(lambda run, name: when_noted(run, 5, interrupt))
    fresh.run("%lora resume")
    end()
    assert fresh["model"].manager.active == ("sql",)
    assert fresh.do("%lora resume").training.steps == 6


def test_a_resumed_run_is_scored_on_the_rows_of_its_variable(bare: Notebook) -> None:
    cell = CELL.replace("--eval-data held", "--score held --metric f1 --every 2")
    killed(4, cell)
    fresh = prepare(bare, adapter=False)
    rows = fresh["held"]
    fresh.do("del held")
    assert fresh.run("%lora resume").line.endswith(
        "pass them again: %lora resume sql-1 --score DATA (not defined here: held)"
    )
    fresh["held"] = rows
    result = fresh.do("%lora resume")
    assert [step for step, _ in result.training.state.metric_history["f1"]] == [2, 4, 6]


@pytest.mark.parametrize(
    ("options", "label", "rows"),
    [
        ("", "Score", "held --tokenizer tok --max-length 12"),
        ("--long drop", "Score", "held --tokenizer tok --max-length 12 --long drop"),
        ("--eval-data 2", "Score on its held-out rows", "rows --tokenizer tok --max-length 12 --held-out"),
    ],
)
def test_the_card_of_a_resumed_run_scores_on_the_same_rows(bare: Notebook, options: str, label: str, rows: str) -> None:
    cell = CELL.replace("--eval-data held", options if "--eval-data" in options else f"--eval-data held {options}")
    killed(4, cell)
    fresh = prepare(bare, adapter=False)
    state = fresh.do("%lora resume").training.state
    command = dict(next_steps(state, fresh.session.state, "model").commands)[label]
    assert command == f"%lora score sql --data {rows}"
    assert len(fresh.do(f"{command} --metric loss").items) == 2


def test_runs_move_to_another_folder(bare: Notebook, place: Path, tmp_path: Path) -> None:
    prepare(bare)
    assert str(bare.do(f"%lora runs --folder {tmp_path}/drive")) == f"there is no run in {tmp_path}/drive yet"
    assert bare.do(CELL).state.folder == f"{tmp_path}/drive/sql-1"
    bare.do("%unload_ext nbpeft")
    get_session().runs_folder(tmp_path / "python")
    bare.do("%load_ext nbpeft")
    assert get_session().runs_folder() == tmp_path / "python", "loading the extension does not take it back"
    assert "mount or create it first" in bare.run("%lora runs --folder no/such/drive/runs").line
    assert str(bare.do("%lora runs --folder off")) == "no runs are saved from now on"
    assert "is disabled" in bare.run("%lora runs").line
