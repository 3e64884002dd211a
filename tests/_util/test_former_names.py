"""Former names of arguments and functions are refused with the present ones, wherever a person may write them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

import nbpeft
from nbpeft._util.former_names import refusing_former_names
from nbpeft.errors import ConfigError
from nbpeft.names import RENAMED, RENAMED_FUNCTIONS
from nbpeft.session import Session
from nbpeft.training.request import TrainRequest


def methods() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, method in inspect.getmembers(Session(), inspect.ismethod):
        if hasattr(method, "__wrapped__"):
            yield f"Session.{name}", method


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in ("forecast", "score", "ship"):
        yield name, getattr(nbpeft, name)


CASES = [
    pytest.param(function, old, new, id=f"{name}-{old}")
    for name, function in (*methods(), *functions())
    for old, news in RENAMED.items()
    for new in news
    if new in (known := inspect.signature(function).parameters) and old not in known
]


@pytest.mark.parametrize(("function", "old", "new"), CASES)
def test_a_former_name_of_an_argument_is_refused_with_the_present_one(
    function: Callable[..., Any], old: str, new: str
) -> None:
    message = rf"^{function.__name__}\(\) has no argument '{old}'; it is called '{new}' now$"
    with pytest.raises(ConfigError, match=message):
        function(**{old: 1})


def test_there_is_a_case_for_every_former_name() -> None:
    assert {case.values[1] for case in CASES} >= {"rows", "base", "safe", "batches", "only", "seq"}


@pytest.mark.parametrize(("old", "new"), RENAMED_FUNCTIONS.items())
def test_a_former_name_of_a_method_is_refused_with_the_present_one(old: str, new: str) -> None:
    assert hasattr(Session, new) or hasattr(nbpeft, new)
    with pytest.raises(AttributeError, match=f"'{old}'; it is called '{new}' now$"):
        getattr(Session(), old)


@pytest.mark.parametrize(("old", "new"), [("rewards", "reward"), ("machines", "hosts"), ("eval", "eval_data")])
def test_a_training_refuses_a_former_name_too(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\(\) has no argument '{old}'; it is called '{new}' now$"):
        TrainRequest.of(nn.Linear(2, 2), [{"text": "a"}], **{old: "b"})


def test_a_name_that_a_function_has_is_its_own() -> None:
    @refusing_former_names
    def scored(rows: int, **options: int) -> tuple[int, dict[str, int]]:
        return rows, options

    assert scored(rows=1, base=2) == (1, {"base": 2}), "it has no include_base"
