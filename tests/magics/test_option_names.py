"""An option ``--x-y`` of a command and the keyword ``x_y`` of the session's method are one word."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import nbpeft
from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.magics.parse import Argument
from nbpeft.session import Session
from nbpeft.training.request import TrainRequest

METHODS = {"lora": "add", "lora_train": "train", "watch": "result"}
"""Commands that are not called as their method."""
HANDED_ON: dict[str, tuple[Callable[..., Any], ...]] = {
    "add": (Session.preview, nbpeft.forecast),
    "lora": (Session.preview, nbpeft.forecast),
    "lora_train": (TrainRequest,),
    "merge": (nbpeft.merge_to_folder,),
    "methods": (nbpeft.forecast,),
    "plan": (nbpeft.forecast, TrainRequest),
    "qlora": (Session.preview_qlora, nbpeft.forecast),
    "resume": (TrainRequest,),
    "score": (nbpeft.score,),
}
"""What a method hands its ``**keywords`` on to, and what a command calls beside its method: its own keywords count."""
IN_THE_NOTEBOOK_ALONE = {
    "--method": "in Python the config's class says it",
    "--panel": "shows widgets",
    "--replace": "of %%qlora: overwrites a variable",
    "--dry-run": "in Python another method previews",
    "--new": "says what is the default",
    "--delete": "is the method delete_run",
    "--rename": "is the method rename_run",
    "--folder": "is the method runs_folder",
    "--traceback": "is the property last_traceback",
}
"""Options that no keyword corresponds to, and why."""
ANOTHER_WORD = {
    "--no-base": ("include_base", "base is the folder of a base model where there is a keyword base"),
    "--template": ("chat_template_kwargs", "a cell has name=value after it, no dictionary"),
    "--for": ("engine", "for is a word of Python"),
    "--inference": ("training", "a switch names what is not the default"),
}
"""Option -> the keyword that is called otherwise, and why."""


def options() -> Iterator[Any]:
    for name, command in {**SUBCOMMANDS, **CELLS}.items():
        for item in command.arguments:
            if not item.positional and name != "panel":  # which is no command of the session
                yield pytest.param(name, item, id=f"{name} {item.flags[0]}")


def keywords_of(name: str) -> set[str]:
    """The keywords of a command's method, and of what it hands them on to."""
    method = getattr(Session, METHODS.get(name, name), None)
    functions = (*HANDED_ON.get(name, ()), *(() if method is None else (method,)))
    return {keyword for function in functions for keyword in inspect.signature(function).parameters}


@pytest.mark.parametrize(("name", "item"), options())
def test_an_option_is_called_as_the_keyword(name: str, item: Argument) -> None:
    flag = next(flag for flag in item.flags if flag.startswith("--"))
    word = flag.removeprefix("--").replace("-", "_")
    known = keywords_of(name)
    if flag in IN_THE_NOTEBOOK_ALONE and word not in known:
        assert flag != "--replace" or name == "qlora"
        return
    if flag in ANOTHER_WORD:
        word = ANOTHER_WORD[flag][0]
    elif word not in known:
        word = "variable" if (name, flag) == ("qlora", "--as") else word.removeprefix("no_")
    assert word in known, f"{name}: no keyword is called as {flag}"


def test_the_exceptions_are_needed() -> None:
    there = {flag for command in {**SUBCOMMANDS, **CELLS}.values() for item in command.arguments for flag in item.flags}
    assert {*IN_THE_NOTEBOOK_ALONE, *ANOTHER_WORD} <= there
