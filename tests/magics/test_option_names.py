"""An option ``--x-y`` of a command and the keyword ``x_y`` of the session's method are one word; a page has all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.magics.parse import Argument
from tests.option_table import ANOTHER_WORD, IN_THE_NOTEBOOK_ALONE, PAGE, flag_of, keyword_of, keywords_of, table


def options() -> Iterator[Any]:
    for name, command in {**SUBCOMMANDS, **CELLS}.items():
        for item in command.arguments:
            if not item.positional and name != "panel":  # which is no command of the session
                yield pytest.param(name, item, id=f"{name} {item.flags[0]}")


@pytest.mark.parametrize(("name", "item"), [*options()])
def test_an_option_is_called_as_the_keyword(name: str, item: Argument) -> None:
    keyword = keyword_of(name, item)
    if keyword is None:
        assert flag_of(item) != "--replace" or name == "qlora"
    else:
        assert keyword in keywords_of(name), f"{name}: no keyword is called as {flag_of(item)}"


def test_the_exceptions_are_needed() -> None:
    there = {flag for command in {**SUBCOMMANDS, **CELLS}.values() for item in command.arguments for flag in item.flags}
    assert {*IN_THE_NOTEBOOK_ALONE, *ANOTHER_WORD} <= there


def test_the_page_of_options_is_that_of_the_parsers() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "python -m tests.option_table writes it"
