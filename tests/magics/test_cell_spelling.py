"""What the session says in words of Python, said in words of cells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nbpeft.session
from nbpeft.magics.cell_spelling import in_cell_spelling
from nbpeft.magics.lora import SUBCOMMANDS
from nbpeft.session import Session

PACKAGE = Path(nbpeft.session.__file__).parent.parent
HEADLESS = ("checkpoint", "engine", "memory", "model", "session", "training")


@pytest.mark.parametrize(
    ("said", "in_a_cell"),
    [
        ("'a' is not active; session.use('a') switches to it", "'a' is not active; %lora use a switches to it"),
        ("they are off; session.on() enables them again", "they are off; %lora on enables them again"),
        ("say which one is meant: model='a' or model='b'", "say which one is meant: --model a or --model b"),
        ("choose another name, or replace it (replace=…)", "choose another name, or replace it (--replace)"),
        ("rows (init_data=…)", "rows (--init-data)"),
        ("error 0.1; session.merge(to=…) keeps full precision", "error 0.1; %lora merge --to DIR keeps full precision"),
        ("enable them first (model.enable_adapter_layers()).", "enable them first (%lora on)."),
        ("convert it to LoRA: save_as_lora(DIR, model, rank=64)", "convert it to LoRA: %lora convert NAME --rank 64"),
        (("add one with session.add(model, config)",), ("add one with a cell that begins with %%lora MODEL",)),
        ("needs evaluations: pass eval_data=… or score=…", "needs evaluations: pass --eval … or --score …"),
        ("eval_data=100 holds out 100 rows", "--eval 100 holds out 100 rows"),
        ("their number (eval_data=0.1)", "their number (--eval 0.1)"),
        ("stop='half' compares", "--stop half compares"),
        ("pass data={'sql': …, 'chat': …}", "pass --data sql=ROWS chat=ROWS"),
        ("'eval_data=1' is text, train_data=3 another name", "'eval_data=1' is text, train_data=3 another name"),
        ("then run.step(loss=…), (r=8)", "then run.step(loss=…), (r=8)"),
        (None, None),
    ],
)
def test_messages(said: object, in_a_cell: object) -> None:
    assert in_cell_spelling(said) == in_a_cell


def test_what_messages_name_is_there_in_cells() -> None:
    sources = [path.read_text(encoding="utf-8") for folder in HEADLESS for path in (PACKAGE / folder).rglob("*.py")]
    messages = [text for source in sources for text in re.findall(r'"[^"\n]*"', source)]
    calls = {name for text in messages for name in re.findall(r"session\.(\w+)\(", text)}
    arguments = {name for text in messages for name in re.findall(r"(?<!\w)\((\w+)=…\)", text)}
    flags = {flag for command in SUBCOMMANDS.values() for item in command.arguments for flag in item.flags}
    assert {"use", "on", "merge"} <= calls
    assert all(hasattr(Session, name) and name in SUBCOMMANDS for name in calls)
    assert {"replace", "name"} <= arguments
    assert {f"--{name.replace('_', '-')}" for name in arguments} <= flags
