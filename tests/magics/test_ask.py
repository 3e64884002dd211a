"""``%lora ask`` and trainings in the background in a real shell."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nbpeft.session.background import BackgroundRun
from nbpeft.session.results.asking import AskResult
from tests.char_tokenizer import CharTokenizer
from tests.magics.notebook import Notebook
from tests.tiny_models import randomize

TRAIN = """%%lora_train model --data rows --background
max_steps = 4
per_device_train_batch_size = 2
learning_rate = 0.05
callbacks = [gate]"""


class Gate(TrainerCallback):
    """Lets a training go on when the test says so."""

    def __init__(self) -> None:
        self.opened, self.began = threading.Event(), threading.Event()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began.set()
        assert self.opened.wait(60)


@pytest.fixture
def ready(adapted: Notebook) -> Notebook:
    randomize(adapted["model"], "sql", 1)
    randomize(adapted["model"], "chat", 2)
    adapted["rows"] = [{"input_ids": [1 + (step + start) % 7 for step in range(6)]} for start in range(8)]
    adapted["tokenizer"] = CharTokenizer("yes")
    adapted["plain"] = CharTokenizer()
    return adapted


@pytest.fixture
def gate(ready: Notebook) -> Iterator[Gate]:
    made = ready["gate"] = Gate()
    yield made
    made.opened.set()


def test_the_active_adapter_answers_or_another(ready: Notebook) -> None:
    asked = ready.do('%lora ask "Hi you" --max-new-tokens 6')
    assert isinstance(asked, AskResult) and (asked.adapter, asked.token_count) == ("sql", 6)
    assert ready.do('%lora ask "Hi you" --max-new-tokens 6 -a chat').adapter == "chat"
    assert ready.do('%lora ask "Hi you" --max-new-tokens 6 --adapter base').adapter == "base"
    both = ready.do('%lora ask "Hi you" --max-new-tokens 6 --adapter sql,chat')
    assert both.adapter == "sql + chat"
    assert ready["model"].active_adapters == ["sql"]


def test_a_seed_repeats_an_answer_and_the_notebooks_numbers_go_on(ready: Notebook) -> None:
    numbers = torch.get_rng_state()
    line = '%lora ask "Hi you" --max-new-tokens 8 --temperature 2 --top-p 0.9 --seed {}'
    first, again, other = (ready.do(line.format(seed)) for seed in (1, 1, 2))
    assert first.text == again.text != other.text
    assert dict(first.settings) == {"temperature": 2.0, "top-p": 0.9, "seed": 1}
    compared = ready.do('%lora compare "Hi you" --max-new-tokens 4 --temperature 2 --seed 1')
    assert "temperature 2, seed 1" in str(compared)
    assert torch.equal(numbers, torch.get_rng_state())


def test_a_conversation_goes_on_or_begins_anew(ready: Notebook) -> None:
    first = ready.do('%lora ask "Hi" --max-new-tokens 4')
    assert ready.do('%lora ask "Why" --follow-up --max-new-tokens 4').turns == (("Hi", first.text),)
    assert ready.do('%lora ask "Hi" --new --max-new-tokens 4').turns == ()
    refused = ready.run('%lora ask "Hi" --follow-up --tokenizer plain')
    assert refused.line == "a conversation needs the chat template, which is not applied here: start a new one"
    assert ready.run('%lora ask "Hi" --follow-up --new').line == "--follow-up and --new exclude each other"


def test_mistakes_are_one_line(ready: Notebook) -> None:
    assert "Did you mean 'sql'?" in ready.run('%lora ask "Hi" --adapter sqk').line
    assert ready.run('%lora ask "Hi" --temperature -1').line == "--temperature must be a number of at least 0, not -1.0"
    assert ready.run('%lora ask "Hi" --top-p 2').line == "--top-p must be above 0 and at most 1, not 2.0"
    assert ready.run("%lora ask").line.startswith("%lora ask needs PROMPT")
    assert ready.run("%lora stop").line == "no training is running: there is nothing to stop"


def test_other_cells_run_while_it_trains(ready: Notebook, gate: Gate) -> None:
    run = ready.do(TRAIN)
    assert isinstance(run, BackgroundRun) and gate.began.wait(60)
    assert str(run) == (
        "started training sql in the background; %lora stop stops it, %lora watch --wait shows how it ended"
    )
    for command in ("use chat", "delete chat", "merge", "unload", "copy sql x", "load somewhere"):
        assert ready.run(f"%lora {command}").line.startswith(("busy: training sql", "there is no folder"))
    again = ready.run(TRAIN)
    assert again.line.startswith("busy: training sql")
    assert "step 0/4" in again.printed  # its live card, which the cell has replaced
    assert ready.run("%%lora model --name more\nr = 2").line.startswith("busy: training sql")
    assert str(ready.do("%lora pause")) == "training sql pauses after the current step (step 0 of 4)"
    gate.opened.set()
    assert ready.do('%lora ask "Hi" --max-new-tokens 3').status == "finished"
    assert run.state is not None and run.state.step == 1
    assert "answered" in str(ready.do('%lora compare "Hi" --max-new-tokens 3'))
    assert ready.run("%lora watch --wait").line.startswith("training sql is paused: resume or stop it before waiting")
    refused = ready.run("%lora resume --data rows").line
    assert refused == "training sql is paused and continues as it is: leave out --data"
    assert str(ready.do("%lora resume")) == "training sql continues (step 1 of 4)"
    result = ready.do("%lora watch --wait")
    assert (result.status, result.steps) == ("finished", 4)
    assert ready.do("%lora watch --wait") == result == run.result
    object.__setattr__(run.result, "shown", "card")  # as in a notebook, where no cell but that of the training has it
    assert "sql finished" in ready.do("%lora watch --wait")._repr_html_() and ready.do("%lora watch --wait").shown == ""
    ready.do("%lora use chat")


def test_a_running_training_is_named_and_shown_again(ready: Notebook, gate: Gate) -> None:
    run = ready.do(TRAIN)
    assert gate.began.wait(60)
    status = ready.do("%lora")
    assert "training sql running: step 0" in str(status) and "(%lora watch shows its card)" in str(status)
    assert "training sql running: step 0" in status._repr_html_()
    name = Path(run.state.folder).name
    for line in ("%lora watch", f"%lora watch {name}"):
        shown = ready.run(line)
        assert shown.error is None and shown.value is None and "training sql running: step 0" in shown.everything
    assert ready.run("%lora watch nosuch").line.startswith("no run is called 'nosuch'")
    gate.opened.set()
    run.wait(60)
    assert "training sql" not in str(ready.do("%lora"))
    ended = ready.do("%lora watch")
    assert str(ended).startswith("training sql finished: step 4/4") and "not saved" in ended._repr_html_()
    assert "%lora save adapters/sql --adapter sql --model model" not in ended._repr_html_()
    assert "%lora save adapters/sql --adapter sql" in ended._repr_html_()


def test_unloading_the_extension_ends_it(ready: Notebook, gate: Gate) -> None:
    run = ready.do(TRAIN)
    gate.opened.set()
    ready.do("%unload_ext nbpeft")
    assert not run.running and run.result is not None
    ready.do("%load_ext nbpeft")
    assert ready.do("%lora_train model --data rows max_steps=1").steps == 1


def test_what_cannot_begin_fails_in_its_cell(ready: Notebook, gate: Gate) -> None:
    failed = ready.run("%%lora_train model --data rows --background\nmax_steps = 2\nlearning_rat = 1")
    assert failed.line.startswith("line 2: 'learning_rat' is not a field of TrainingArguments.")
    assert ready.run("%%lora_train model --data nothing --background\nmax_steps = 2").line
    ready.do("%lora use chat")
