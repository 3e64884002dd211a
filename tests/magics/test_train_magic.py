"""``%%lora_train`` in a real shell."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from nbpeft.magics.notebook_context import TrainingCell
from nbpeft.state import SessionState
from nbpeft.training import Run
from nbpeft.training.request import TrainRequest
from tests.magics.notebook import Notebook
from tests.magics.test_cells import fingerprint

CELL = """%%lora_train model --data rows --eval-data held_out
max_steps = 3
per_device_train_batch_size = 2
learning_rate = 0.05"""


def some_rows(count: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [1 + (step + start) % 7 for step in range(6)]} for start in range(count)]


@pytest.fixture
def ready(adapted: Notebook) -> Any:
    adapted["rows"] = some_rows(8)
    adapted["held_out"] = some_rows(2)
    return adapted


def test_a_cell_trains_the_active_adapter(ready: Notebook) -> None:
    before = {name: p.detach().clone() for name, p in ready["model"].named_parameters()}
    result = ready.do(CELL)
    assert (result.status, result.steps, result.adapter) == ("finished", 3, "sql")
    assert result.eval_loss is not None
    changed = {name for name, p in ready["model"].named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".sql." in name for name in changed)


def test_rows_are_packed_where_the_line_says_so(ready: Notebook) -> None:
    result = ready.do("%%lora_train model --data rows --packing --max-length 24\nmax_steps = 2")
    assert result.steps == 2 and "8 rows packed in 2 sequences of 24 tokens (100% full)" in result.message
    assert result.token_count == 2 * 8 * 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*exploded", "ignore:.*NaN", "ignore:Training stopped")
def test_a_cell_says_whether_a_training_that_diverges_goes_on(ready: Notebook) -> None:
    body = "max_steps = 4\nlearning_rate = 1e38\nmax_grad_norm = 0\nlr_scheduler_type = 'constant'"
    assert ready.do(f"%%lora_train model --data rows\n{body}").status == "stopped"
    on = ready.do(f"%%lora_train model --data rows\n{body}\nstop_on_divergence = False")
    assert (on.status, on.steps) == ("finished", 4)


def test_another_adapter_s_folder_is_replaced_only_where_the_line_says_so(ready: Notebook, tmp_path: Path) -> None:
    cell = f"%%lora_train model --data rows\nmax_steps = 1\noutput_dir = {str(tmp_path)!r}"
    ready.do(cell)
    ready.do("%lora rename sql codes")
    ready.do(cell)  # its own, by another name
    shutil.copytree(tmp_path / "codes", tmp_path / "chat", dirs_exist_ok=True)
    told = ready.run(cell).line
    assert "chat holds another adapter, 'codes'" in told and told.endswith("replace it (--replace)")
    ready.do(cell.replace("--data", "--replace --data"))
    ready.do(f"%lora export {tmp_path / 'train.py'} --base {tmp_path}")
    assert '"replace"' not in (tmp_path / "train.py").read_text()


def test_an_adapter_can_be_chosen(ready: Notebook) -> None:
    result = ready.do("%lora_train model --data rows --adapter chat max_steps=1")
    assert result.adapter == "chat"
    assert ready["model"].active_adapters == ["chat"]


def test_data_can_be_an_expression(ready: Notebook) -> None:
    ready["split"] = {"train part": some_rows(4)}
    assert ready.do('%lora_train model --data split["train part"] max_steps=1').steps == 1


def test_the_session_tells_how_it_goes(ready: Notebook) -> None:
    seen: list[SessionState] = []
    started: list[tuple[Run, str]] = []
    ready.session.subscribe(seen.append)
    ready.session.on_run(lambda run, name: started.append((run, name)))
    ready.do(CELL)
    states = [model.training for state in seen if (model := state.model("model")) is not None and model.training]
    assert [name for _, name in started] == ["model"]
    assert states[0].status == "running"
    assert states[-1].status == "finished"
    assert states[-1].memory is not None
    assert seen[0].busy == "training sql" and seen[-1].busy == ""
    assert ready.session.state.busy == ""
    assert ready.session.control("model") is None


def test_stop_from_elsewhere(ready: Notebook) -> None:
    ready.session.on_run(lambda run, name: ready.session.control(name).request_stop("enough"))  # type: ignore[union-attr]
    result = ready.do(CELL)
    assert result.status == "stopped"
    assert "enough" in result.message


@pytest.mark.drawn(8)
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("%%lora_train model\nmax_steps = 1", "%%lora_train needs --data, e.g. %%lora_train model --data"),
        ("%%lora_train model --data rowz\nmax_steps = 1", "name 'rowz' is not defined. Did you mean 'rows'"),
        ("%%lora_train modle --data rows\nmax_steps = 1", "no variable is called 'modle'. Did you mean 'model'?"),
        (
            "%%lora_train model --data rows\nr = 8",
            "'r' is not a field of TrainingArguments. It is a field of an adapter",
        ),
        ("%%lora_train model --data rows\nmax_step = 1", "line 1: 'max_step' is not a field of TrainingArguments."),
        ("%%lora_train model --data rows\nlr = 1", "Did you mean 'learning_rate'?"),
        (
            "%%lora_train model --data rows --learning-rate 1e-4\nmax_steps = 1",
            "%%lora_train has no option --learning-rate. A field is set without dashes: learning_rate=…",
        ),
        ("%%lora_train model --data rows --lr=1e-4\nmax_steps = 1", "set without dashes: learning_rate=…"),
        ("%%lora_train model --data rows --objective simpo\nsimpo_gama = 1", "Did you mean 'simpo_gamma'?"),
        ("%%lora_train model --data rows\ndata = 1", "data is an option of the magic's line"),
        ("%%lora_train model --data rows\nkeep = False", "keep is an option of the magic's line"),
        ("%%lora_train model --data rows\nrestart = True", "restart is an option of the magic's line"),
        ("%%lora_train model --data rows\ndata_hint = 'x'", "data_hint is an option of the magic's line"),
        (
            "%%lora_train model --data rows --max-length 8\nmax_length = 4",
            "max_length is an option of the magic's line",
        ),
        ("%%lora_train model --data rows --track trackio\ntrack = 'wandb'", "track is an option of the magic's line"),
        (
            "%lora_train model --data rows --trainer-class Kind trainer_class={Kind}",
            "trainer_class is an option of the magic's",
        ),
        ("%lora clone sql name=y", "name is an option of the magic's line"),
        ("%lora clone sql model=y", "model is an option of the magic's line"),
        ("%%lora_train model --data rows[9]['x']\nmax_steps = 1", "IndexError"),
        ("%%lora_train model --data rows[\nmax_steps = 1", "--data: 'rows[' is not a valid expression"),
        ("%%lora_train model --data rows --adapter nope\nmax_steps = 1", "'nope' not found"),
        ("%%lora_train bare --data rows\nmax_steps = 1", "no adapters"),
        ("%%lora_train model --data number\nmax_steps = 1", ""),
        ("%%lora_train model --data rows\neval_strategy = 'sometimes'", ""),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(ready: Notebook, cell: str, message: str) -> None:
    ready["bare"] = torch.nn.Linear(2, 2)
    ready["number"] = 3
    ready["Kind"] = Trainer
    before, state = fingerprint(ready["model"]), ready.session.state.models
    assert message in ready.run(cell).line
    assert fingerprint(ready["model"]) == before
    assert ready.session.state.models == state


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    "body",
    ["max_steps = 'x'", "adam_beta1 = 5", "learning_rat = 1", "max_steps = 1 /", "optim = 'adamm'", "deepspeed = 'x'"],
)
def test_a_mistake_beside_an_adapter_switches_nothing(ready: Notebook, body: str) -> None:
    """Neither which adapter acts nor what is merged."""
    ready.do("%lora merge")
    manager = ready["model"].manager
    before, tensors = fingerprint(ready["model"]), {k: v.clone() for k, v in ready["model"].state_dict().items()}
    body = body if "max_steps" in body else f"{body}\nmax_steps = 1"
    assert ready.run(f"%%lora_train model --data rows --adapter chat\n{body}").line
    assert (manager.active, manager.merged, manager.enabled) == (("sql",), ("sql",), True)
    assert fingerprint(ready["model"]) == before
    assert all(torch.equal(part, tensors[name]) for name, part in ready["model"].state_dict().items())


def test_an_adapter_that_is_frozen_cannot_train(ready: Notebook) -> None:
    ready.do("%lora freeze sql")
    assert "Nothing is trainable" in ready.run(CELL).line


def test_tracking_a_loop(ready: Notebook) -> None:
    ready.do(
        "import torch, nbpeft\n"
        "optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)\n"
        "with nbpeft.start_run(model, total_steps=2) as run:\n"
        "    for row in rows[:2]:\n"
        "        ids = torch.tensor([row['input_ids']])\n"
        "        loss = model(input_ids=ids, labels=ids).loss\n"
        "        loss.backward(); optimizer.step(); optimizer.zero_grad()\n"
        "        run.step(loss)\n"
    )
    training = ready.session.state.models[0].training
    assert training is not None
    assert (training.status, training.step, training.adapter) == ("finished", 2, "sql")


def test_the_last_training_can_be_exported(ready: Notebook, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    told = ready.run(f"%lora export {script}").line
    assert told == "nothing was trained by a %%lora_train cell in this notebook, so there is nothing to export yet"
    ready.do(CELL)
    assert "the source of this LlamaForCausalLM is unknown" in ready.run(f"%lora export {script}").line
    assert not script.exists()
    result = ready.do(f"%lora export {script} --base {tmp_path}")
    assert str(result).startswith(f"wrote {script}, which trains 'sql', and 8 rows in {tmp_path}/train_data-")
    text = script.read_text()
    assert '"max_steps": 3' in text and '"learning_rate": 0.05' in text and "train_eval-" in text
    assert "new weights" not in str(result)
    ready.do(CELL)
    again = str(ready.do(f"%lora export {script} --base {tmp_path} --replace"))
    assert "the script starts from new weights, and the training here from those after step 3 of run sql-" in again


@pytest.mark.parametrize("line", ["%lora copy a twin", "%lora rename a twin"])
def test_a_field_that_was_written_is_exported_of_a_copy_and_under_a_new_name(
    ready: Notebook, tmp_path: Path, line: str
) -> None:
    ready.do("%%lora model --name a\nr = 8\ntarget_modules = ['q_proj']")
    ready.do(line)
    ready.do("%lora use twin")
    ready.do("%%lora_train model --data rows\nmax_steps = 1")
    ready.do(f"%lora export {tmp_path / 'train.py'} --base {tmp_path}")
    assert '"r": 8,' in (tmp_path / "train.py").read_text()


def test_a_token_of_the_cell_reaches_neither_the_script_nor_what_is_shown(ready: Notebook, tmp_path: Path) -> None:
    token = "hf_" + "aB3d" * 8
    told = str(ready.do(f"{CELL}\nhub_token = {token!r}"))
    result = ready.do(f"%lora export {tmp_path / 'train.py'} --base {tmp_path}")
    assert "hub_token left out, because a script must not contain secrets" in str(result) and "HF_TOKEN" in str(result)
    shown = told + str(result) + result._repr_html_() + (tmp_path / "train.py").read_text()
    assert token not in shown + repr(TrainingCell("rows", None, None, {"hub_token": token}, ()))


@pytest.mark.drawn(1)
@pytest.mark.parametrize("said", ["--max-length 4\nmax_steps = 1", "\nmax_length = 4\nmax_steps = 1"])
def test_what_rows_are_cut_to_is_exported_wherever_it_was_said(ready: Notebook, tmp_path: Path, said: str) -> None:
    from tests.char_tokenizer import CharTokenizer

    ready["tok"], ready["rows"] = CharTokenizer(), [{"text": "abcdefgh"}] * 2
    ready.do(f"%%lora_train model --data rows --tokenizer tok {said}")
    ready.do(f"%lora export {tmp_path}/t.py --base somewhere")
    rows = next(tmp_path.glob("t_data*.jsonl")).read_text().splitlines()
    assert [len(json.loads(row)["input_ids"]) for row in rows] == [4, 4]


def test_an_object_of_the_notebook_cannot_be_exported(ready: Notebook, tmp_path: Path) -> None:
    ready["mine"] = [TrainerCallback()]
    ready.run("%%lora_train model --data rows\nmax_steps = 1\ncallbacks = mine")
    told = ready.run(f"%lora export {tmp_path}/train.py").line
    assert told == "callbacks: objects of the notebook cannot be written into a script"


def test_a_cell_that_fails_is_not_what_is_exported(ready: Notebook, tmp_path: Path) -> None:
    ready.do(CELL)
    assert "found an int" in ready.run("%lora_train model --data 5 max_steps=1").line
    ready.do(f"%lora export {tmp_path / 'train.py'} --base {tmp_path}")
    assert '"max_steps": 3' in (tmp_path / "train.py").read_text()


class At(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def interrupt() -> None:
    raise KeyboardInterrupt


def fail() -> None:
    raise ZeroDivisionError("in my own code")


def test_an_interruption_keeps_what_was_learned_and_is_one_quiet_line(ready: Notebook) -> None:
    ready["callbacks"] = [At(2, interrupt)]
    before = {name: p.detach().clone() for name, p in ready["model"].named_parameters()}
    outcome = ready.run(f"{CELL}\ncallbacks = callbacks")
    assert isinstance(outcome.error, KeyboardInterrupt)  # a cell that fails keeps those queued behind from running
    (line,) = outcome.error._render_traceback_()  # type: ignore[attr-defined]
    assert line.startswith("sql stopped · 2 of 3 steps") and line.endswith("progress is kept")
    assert line in outcome.printed + outcome.complained
    assert "Traceback" not in outcome.printed + outcome.complained
    assert any(not torch.equal(p, before[name]) for name, p in ready["model"].named_parameters())
    result = ready.session.last_result
    assert result is not None and (result.status, result.steps) == ("stopped", 2)
    assert ready.do("1 + 1") == 2


@pytest.mark.parametrize("line", ["%lora plan model", "%lora methods model --batch-size 1 --max-length 8"])
def test_an_interrupted_command_is_one_line(ready: Notebook, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr("nbpeft.memory.estimate.weights_of", lambda setting: interrupt())
    outcome = ready.run(line)
    assert isinstance(outcome.error, KeyboardInterrupt)
    assert outcome.error._render_traceback_() == ["%lora was interrupted"]  # type: ignore[attr-defined]
    assert "Traceback" not in outcome.printed + outcome.complained


def test_an_interruption_of_the_session_is_one_line_too(ready: Notebook) -> None:
    ready["callbacks"] = [At(1, interrupt)]
    outcome = ready.run(
        "import nbpeft\nresult = nbpeft.get_session().train(model, rows, max_steps=3, callbacks=callbacks)\nafter = 1"
    )
    assert isinstance(outcome.error, KeyboardInterrupt)
    assert "Traceback" not in outcome.printed + outcome.complained
    assert "after" not in ready.shell.user_ns


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("model --data rows\nmax_steps = 1\nreport_to = 'comet_ml'", "report_to: CometCallback requires comet-ml"),
        ("model --data rows\nmax_steps = 1\nlearning_rate = float('nan')", "learning_rate must be a number, not nan"),
        (
            "model --data rows\nmax_steps = 1\npush_to_hub = True\nhub_model_id = 'a/b'\noutput_dir = folder",
            "push_to_hub: the hub cannot be reached",
        ),
        ("model --data unknown\nmax_steps = 1", "Expected columns prompt and completion, messages, text, "),
        ("net --data rows\nmax_steps = 1", "a Trainer cannot train a Sequential, whose forward takes no labels"),
        ("model --data rows\nmax_steps = 3\ncallbacks = failing", "ZeroDivisionError: in my own code"),
    ],
)
def test_a_run_that_fails_is_one_line_with_its_traceback_folded(
    ready: Notebook, tmp_path: Path, cell: str, words: str
) -> None:
    ready["net"] = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    ready.do("%%lora net --name plain\nr = 2\ntarget_modules = ['0']")
    ready["folder"], ready["unknown"], ready["failing"] = str(tmp_path), [{"a": 1}], [At(1, fail)]
    outcome = ready.run(f"%%lora_train {cell}")
    assert words in outcome.line
    assert len(outcome.line) < 500
    folded = str(ready.do("%lora doctor --traceback"))
    assert folded.startswith("Traceback (most recent call last)") and words.partition(":")[0] in folded


def test_a_kept_traceback_keeps_no_tensor_alive(ready: Notebook) -> None:
    alive: list[Any] = []

    def big() -> None:
        activations = torch.zeros(1000)
        alive.append(weakref.ref(activations))
        raise ValueError("lost")

    ready["callbacks"] = [At(1, big)]
    assert "ValueError: lost" in ready.run(f"{CELL}\ncallbacks = callbacks").line
    assert "in big" in str(ready.do("%lora doctor --traceback"))
    assert alive[0]() is None


def test_before_any_failure_there_is_no_traceback(ready: Notebook) -> None:
    ready.session.context.last_traceback = ""
    assert str(ready.do("%lora doctor --traceback")) == "no command has failed yet"


def test_a_warning_is_said_once(ready: Notebook) -> None:
    outcome = ready.run("%%lora_train model --data rows\nmax_steps = 2\nlearning_rate = 0.0")
    assert outcome.error is None
    assert (outcome.printed + outcome.complained).count("No weight of adapter 'sql' has changed") == 1
    assert "No weight of adapter" in str(outcome.value)


def test_patience_and_samples_by_a_word(ready: Notebook) -> None:
    from tests.char_tokenizer import CharTokenizer

    ready["tok"], ready["held_out"] = CharTokenizer(), [{"input_ids": [50, 20, 60, 30, 40]}]
    line = "%%lora_train model --data rows --eval-data held_out --tokenizer tok --patience 1"
    result = ready.do(f'{line} --sample "Oslo needs" --sample two --every 2\nmax_steps = 20\nlearning_rate = 1.0')
    assert result.best_step is not None
    assert "stopped early: no improvement in 1 evaluation" in result.message
    assert [sample.prompt for sample in result.state.samples][:2] == ["Oslo needs", "two"]
    training = ready.session.state.models[0].training
    assert training is not None and training.samples == result.state.samples
    told = ready.run("%%lora_train model --data rows --patience 3\nmax_steps = 1").line
    assert told.startswith("--patience needs evaluation data: pass --eval-data")


@pytest.mark.slow
def test_patience_is_exported_and_samples_are_not(ready: Notebook, tmp_path: Path) -> None:
    from tests.char_tokenizer import CharTokenizer

    ready["tok"] = CharTokenizer()
    ready.do(
        "%lora_train model --data rows --eval-data held_out --tokenizer tok --patience 2 --sample a --every 1 "
        "max_steps=2"
    )
    ready.do(f"%lora export {tmp_path / 'train.py'} --base {tmp_path}")
    text = (tmp_path / "train.py").read_text()
    assert '"patience": 2' in text and '"sample"' not in text and '"every"' not in text


def test_a_script_has_neither_scores_nor_a_patience_by_them(ready: Notebook, tmp_path: Path) -> None:
    from datasets import Dataset

    from tests.char_tokenizer import CharTokenizer

    def short(answer: str, row: object) -> bool:
        return len(answer) < 2

    ready["tok"], ready["short"] = CharTokenizer(), short
    ready["scored"] = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 2)
    line = "%lora_train model --data rows --tokenizer tok --score scored --metric short --patience 2 max_steps=1"
    ready.do(f"{line} metric_for_best_model=short greater_is_better=True")
    told = str(ready.do(f"%lora export {tmp_path / 'train.py'} --base {tmp_path}"))
    text = (tmp_path / "train.py").read_text()
    assert not any(name in text for name in ('"score"', '"metric', '"patience"', '"greater'))
    assert "the script does not stop early: patience monitors scores in the cell" in told


def test_processes_and_machines_are_said_in_the_line(ready: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[TrainRequest] = []
    monkeypatch.setattr(
        "nbpeft.training.loop.train.train_in_subprocesses", lambda request, *others: given.append(request) or {}
    )
    ready.do("%lora_train model --data rows --processes 2 --hosts 10.0.0.1 10.0.0.2 max_steps=1 fsdp=True")
    assert (given[0].processes, given[0].hosts) == (2, ["10.0.0.1", "10.0.0.2"])
    assert given[0].arguments["fsdp"] is True and given[0].arguments["max_steps"] == 1
    assert given[0].replace is True, "what output_dir holds is checked before the processes start"
    refused = ready.run("%lora_train model --data rows max_steps=1 fsdp=True").line
    assert refused == "fsdp shards a model over several processes: set their number with --processes"
    assert ready.run("%lora_train model --data rows processes=2").line.endswith(
        "is an option of the magic's line, not a field of the cell"
    )
