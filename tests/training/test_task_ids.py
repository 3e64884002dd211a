"""Rows that say of which task they are: to the adapter, whatever form they have, and into a script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import nbpeft
from nbpeft.errors import AdapterError, TrainingError
from nbpeft.training import prepare_data
from nbpeft.training.data import ModelInputs
from nbpeft.training.loop.rows import training_rows
from nbpeft.training.request import TrainRequest
from nbpeft.training.script.export import export_script
from tests.char_tokenizer import CharTokenizer
from tests.tiny_models import llama, randomize

FIELDS: dict[str, dict[str, Any]] = {
    "poly": {"n_tasks": 3},
    "multitask_prompt_tuning": {"num_tasks": 3, "num_virtual_tokens": 2},
}
OF_EACH_TASK = {"poly": "poly_router", "multitask_prompt_tuning": "prefix_task_rows"}
FORMS: dict[str, list[dict[str, Any]]] = {
    "tokens": [{"input_ids": [5, 6, 7, place]} for place in range(4)],
    "text": [{"text": f"task {place}"} for place in range(4)],
    "pairs": [{"prompt": "a", "completion": f"b {place}"} for place in range(4)],
}
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(method: str = "poly") -> Any:
    model = nbpeft.get_peft_model(llama(), nbpeft.get_peft_config({"peft_type": method.upper(), **FIELDS[method]}))
    randomize(model, scale=0.1)
    return model


def of_tasks(form: str, tasks: tuple[Any, ...] = (0, 2, 0, 2)) -> list[dict[str, Any]]:
    return [{**row, "task_ids": task, "source": "x"} for row, task in zip(FORMS[form], tasks, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", FIELDS)
def test_only_the_tasks_of_the_rows_are_learned(method: str, form: str, tmp_path: Path) -> None:
    """With transformers' Trainer, for tokenized rows, only if ``remove_unused_columns`` is off."""
    model = adapted(method)
    own = [one for path, one in model.named_parameters() if OF_EACH_TASK[method] in path]
    before = [one.detach().clone() for one in own]
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "max_steps": 2, "report_to": "none"}
    rows = list(training_rows(TrainRequest(model, of_tasks(form), tokenizer=CharTokenizer())).train)
    nbpeft.train(model, rows, rows, **settings)
    for parameter, old in zip(own, before, strict=True):
        assert ((parameter - old).flatten(1).abs().amax(1) > 0).tolist() == [True, False, True]


def test_what_is_no_task_names_the_row() -> None:
    tokenizer = CharTokenizer()
    found = training_rows(TrainRequest(adapted(), of_tasks("text"), tokenizer=tokenizer)).train
    assert [row["task_ids"] for row in found] == [0, 2, 0, 2] and "source" not in found[0]
    for wrong, words in (("two", "'task_ids' is a str"), (1.5, "'task_ids' is a float"), (None, "'task_ids' is None")):
        with pytest.raises(TrainingError, match=f"Row 1: {words}"):
            training_rows(TrainRequest(adapted(), of_tasks("text", (0, wrong, 0, 0)), tokenizer=tokenizer))
    plain = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(r=2))
    assert "task_ids" not in training_rows(TrainRequest(plain, of_tasks("text"), tokenizer=tokenizer)).train[0]
    takes = ModelInputs(numbers=("task_ids",))
    assert prepare_data(FORMS["text"], tokenizer, inputs=takes)[0].keys() == {"input_ids", "labels"}


def test_rows_without_a_task_are_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none"}
    with pytest.raises(AdapterError, match="task_ids cannot be None"):
        nbpeft.train(adapted(), FORMS["tokens"], **settings)


@pytest.mark.parametrize("form", FORMS)
def test_a_script_has_the_task_of_each_row(form: str, tmp_path: Path) -> None:
    written = export_script(
        adapted(), tmp_path / "run.py", of_tasks(form), tokenizer=CharTokenizer(), base="a/b", report_to="none"
    )
    lines = [json.loads(line) for line in written.data[0].read_text().splitlines()]
    assert [line["task_ids"] for line in lines] == [0, 2, 0, 2]
