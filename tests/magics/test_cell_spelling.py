"""What the session says in words of Python, said in words of cells."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import nbpeft.session
from nbpeft.magics.cell_spelling import in_cell_spelling, option_names
from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.session import Session
from nbpeft.session.results.paged_scores import PagedScores, ScoreResult

PACKAGE = Path(nbpeft.session.__file__).parent.parent
HEADLESS = ("checkpoint", "engine", "memory", "model", "session", "training")


@pytest.mark.parametrize(
    ("said", "in_a_cell"),
    [
        ("'a' is not active; session.use('a') switches to it", "'a' is not active; %lora use a switches to it"),
        ("session.use(['a', 'b']) goes back", "%lora use a b goes back"),
        (
            "session.freeze('a', off=True, model='b') makes it trainable",
            "%lora freeze a --off --model b makes it trainable",
        ),
        ("say which one is meant: model='a' or model='b'", "say which one is meant: --model a or --model b"),
        ("choose another name, or replace it (replace=…)", "choose another name, or replace it (--replace)"),
        ("rows (init_data=…)", "rows (--init-data)"),
        ("rename it (session.rename('a', 'NEW'))", "rename it (%lora rename a NEW)"),
        ("model.set_requires_grad('a') makes it trainable", "%lora freeze a --off makes it trainable"),
        ("error 0.1; session.merge(to=…) keeps full precision", "error 0.1; %lora merge --to DIR keeps full precision"),
        ("enable them first (model.enable_adapter_layers()).", "enable them first (%lora use NAME)."),
        ("convert it to LoRA: save_as_lora(DIR, model, rank=64)", "convert it to LoRA: %lora convert NAME --r 64"),
        (("add one with session.add(model, config)",), ("add one with a cell that begins with %%lora MODEL",)),
        ("pass data={'sql': …, 'chat': …}", "pass --data sql=DATA chat=DATA"),
        ("then run.step(loss=…), (r=8)", "then run.step(loss=…), (r=8)"),
        (None, None),
    ],
)
def test_messages(said: object, in_a_cell: object) -> None:
    assert in_cell_spelling(said) == in_a_cell


@pytest.mark.parametrize(
    ("command", "said", "in_a_cell"),
    [
        (
            "lora_train",
            "halving=True needs evaluations: pass eval_data=… or score=…",
            "--halving needs evaluations: pass --eval-data or --score",
        ),
        ("lora_train", "eval_data=3 is neither data, nor a share", "--eval-data 3 is neither data, nor a share"),
        ("lora_train", "eval_by groups the rows (eval_data=0.1)", "--eval-by groups the rows (--eval-data 0.1)"),
        ("use", "model has an adapter 'mail' already", "model has an adapter 'mail' already"),
        ("use", "model has several adapters: name one", "model has several adapters: name one"),
        (
            "lora_train",
            "'x' is none of 'chat_template_kwargs', 'weight'",
            "'x' is none of 'chat_template_kwargs', 'weight'",
        ),
        ("lora_train", "remove seed=3, or learning_rate='x'", "remove seed=3, or learning_rate='x'"),
        (
            "lora_train",
            "no 'max_length' or x.max_length, max_length_of",
            "no 'max_length' or x.max_length, max_length_of",
        ),
        ("lora_train", "3 rows cut to 8 tokens (max_length)", "3 rows cut to 8 tokens (--max-length)"),
        (
            "score",
            "answers cut at 4 tokens (max_new_tokens): base 2",
            "answers cut at 4 tokens (--max-new-tokens): base 2",
        ),
        ("score", "no adapters, and include_base=False", "no adapters, and --no-base"),
        ("score", "general=True for a general text", "--general for a general text"),
        ("data", "preference tuning (objective='dpo')", "preference tuning (--objective dpo)"),
        ("ship", "give its name, e.g. base='gemma2:2b' (base=…)", "give its name, e.g. --base gemma2:2b (--base)"),
        ("load", "there is no folder /tmp/eval_data/max_length-3.", "there is no folder /tmp/eval_data/max_length-3."),
        ("load", r"no C:\max_length, hub/x?seed=3", r"no C:\max_length, hub/x?seed=3"),
        ("data", "row 3: found 'say max_length=5 or eval_by'", "row 3: found 'say max_length=5 or eval_by'"),
        ("data", 'an adapter\'s "seed=3": raise max_length.', 'an adapter\'s "seed=3": raise --max-length.'),
        ("lora_train", "%lora data eval_data --columns prompt=a", "%lora data eval_data --columns prompt=a"),
        ("lora_train", "%lora score a --data eval_data, eval_by", "%lora score a --data eval_data, --eval-by"),
        ("use", "session.use('max_length') switches", "%lora use max_length switches"),
        ("save", "model has no adapter to save", "model has no adapter to save"),
        ("lora_train", "adapter='max_length' is frozen", "--adapter max_length is frozen"),
        ("lora_train", "every has no effect without score=…", "--every has no effect without --score"),
        ("lora_train", "patience needs evaluation data", "--patience needs evaluation data"),
        (
            "lora_train",
            "'eval_data=1' is text, train_data=3 another name",
            "'eval_data=1' is text, train_data=3 another name",
        ),
        ("lora_train", "the score has a name", "the score has a name"),
        ("plan", "the batch has 3 rows", "the batch has 3 rows"),
        ("use", "rows of 'replace=True' stay", "rows of 'replace=True' stay"),
    ],
)
def test_arguments_are_options_of_the_command(command: str, said: str, in_a_cell: str) -> None:
    commands = {**SUBCOMMANDS, **CELLS}
    assert in_cell_spelling(said, option_names(commands[command], commands.values())) == in_a_cell


def test_what_messages_name_is_there_in_cells() -> None:
    sources = [path.read_text(encoding="utf-8") for folder in HEADLESS for path in (PACKAGE / folder).rglob("*.py")]
    messages = [text for source in sources for text in re.findall(r'"[^"\n]*"', source)]
    calls = {name for text in messages for name in re.findall(r"session\.(\w+)\(", text)}
    arguments = {name for text in messages for name in re.findall(r"(?<!\w)\((\w+)=…\)", text)}
    flags = {flag for command in SUBCOMMANDS.values() for item in command.arguments for flag in item.flags}
    assert {"undo", "use", "merge"} <= calls
    assert all(hasattr(Session, name) for name in calls)
    assert {in_cell_spelling(f"session.{name}()").split()[1] for name in calls} <= set(SUBCOMMANDS)
    assert {"replace", "name"} <= arguments
    assert {f"--{name.replace('_', '-')}" for name in arguments} <= flags


def test_scores_whose_notes_are_rewritten_remain_a_panel() -> None:
    shown: list[object] = []
    scores = ScoreResult(*(() for _ in dataclasses.fields(ScoreResult)))
    given = PagedScores.of(dataclasses.replace(scores, notes=("cut at 4 tokens (max_new_tokens)",)), shown.append)
    said = in_cell_spelling(given, option_names(SUBCOMMANDS["score"], ()))
    said._ipython_display_()
    assert said.notes == ("cut at 4 tokens (--max-new-tokens)",) and shown == [said]
