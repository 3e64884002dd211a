"""A fault gets into functions that are imported already, and what acts at an import is told."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.mutation import patching
from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.patching import functions, put

SOURCE = """
def larger(number, by=1):
    if number < 0:
        raise ValueError(
            number
        )
    return number + by


class Sized:
    size = 3

    def __init__(self):
        super().__init__()
        self.length = 4


def counts():
    def count():
        return 5

    return count
"""


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "nbpeft").mkdir()
    (tmp_path / "nbpeft" / "patched_module_of_a_test.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "nbpeft"))
    monkeypatch.setattr(patching, "ROOT", tmp_path)
    monkeypatch.setattr(patching, "read", lambda path: SOURCE)
    yield importlib.import_module("patched_module_of_a_test")
    del sys.modules["patched_module_of_a_test"]


def the(operator: str, before: str) -> Mutant:
    found = mutants_of("nbpeft/patched_module_of_a_test.py", SOURCE)
    return next(each for each in found if (each.operator, each.before.partition("\n")[0]) == (operator, before))


def test_a_function_gets_a_fault(imported: ModuleType) -> None:
    assert put(the("flip a sign", "number + by"), functions())
    assert imported.larger(4) == 3


def test_a_function_and_not_those_below_whose_lines_move(imported: ModuleType) -> None:
    before = imported.Sized.__init__.__code__
    assert put(the("drop a check", "if number < 0:"), functions())
    assert imported.larger(-1) == 0
    assert imported.Sized.__init__.__code__ is before


def test_a_function_in_a_function_and_a_method(imported: ModuleType) -> None:
    assert put(the("change a constant", "5"), functions())
    assert imported.counts()() == 6
    assert put(the("change a constant", "4"), functions())
    assert imported.Sized().length == 5


@pytest.mark.parametrize(
    ("operator", "before"),
    [("change a constant", "1"), ("change a constant", "3"), ("drop a statement", "super().__init__()")],
)
def test_what_acts_at_an_import_or_needs_another_closure_is_told(
    imported: ModuleType, operator: str, before: str
) -> None:
    assert not put(the(operator, before), functions())
