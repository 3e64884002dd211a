"""Faults are found, drawn and imported as they are described."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tests.mutation.killing import with_fault
from tests.mutation.mutants import OPERATORS, Mutant, draw, mutants_of

SOURCE = '''"""A module."""

LIMIT: int = 3


def area(width, height=-1):
    """Two numbers."""
    if width < 0:
        raise ValueError(f"{width + 1} is negative")
    sizes.update(width, height)
    total = width * LIMIT if height else 0
    return total


if TYPE_CHECKING:
    LIMIT = 4
'''
FOUND = {
    "flip a comparison": {"width < 0 -> (width <= 0)"},
    "flip a sign": {"-1 -> (1)", "width * LIMIT -> (width / LIMIT)"},
    "negate a condition": {"width < 0 -> (not (width < 0))", "height -> (not (height))"},
    "drop a check": {'if width < 0: raise ValueError(f"{width + 1} is negative") -> pass'},
    "swap two arguments": {"sizes.update(width, height) -> sizes.update(height, width)"},
    "change a constant": {"3 -> (4)", "1 -> (2)", "0 -> (1)"},
    "drop a statement": {"sizes.update(width, height) -> pass"},
    "return early": {
        'if width < 0: raise ValueError(f"{width + 1} is negative") -> return',
        "sizes.update(width, height) -> return",
        "total = width * LIMIT if height else 0 -> return",
        "return total -> return",
    },
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_an_operator_changes(operator: str) -> None:
    found = {str(mutant).partition(f"{operator}: ")[2] for mutant in of(operator)}
    assert found == FOUND[operator]


def of(operator: str, source: str = SOURCE) -> list[Mutant]:
    return [mutant for mutant in mutants_of("nbpeft/area.py", source) if mutant.operator == operator]


def test_what_acts_at_import_is_known() -> None:
    assert [mutant.in_function for mutant in of("change a constant")] == [False, True, True, True]
    assert all(mutant.in_function for mutant in of("return early"))


def test_claims_and_what_only_speaks_stay() -> None:
    source = 'zip(a, b, strict=True)\nwarn("x", stacklevel=2)\nassert a > 1\nraise ValueError(3)\n'
    assert of("change a constant", source) == []


def test_a_draw_is_the_same_for_its_seed_and_takes_each_operator_by_turns() -> None:
    found = mutants_of("nbpeft/area.py", SOURCE)
    drawn = {seed: draw(found, 8, seed, lambda path: SOURCE) for seed in (1, 2, 3)}
    assert [mutant.operator for mutant in drawn[1]] == list(OPERATORS)
    assert drawn[1] == draw(found, 8, 1, lambda path: SOURCE)
    assert len({str(drawn[seed]) for seed in drawn}) > 1
    assert len(draw(found, 1000, 1, lambda path: SOURCE)) == len(found)


def test_what_is_no_python_is_not_drawn() -> None:
    source = "match x:\n    case {1: y}:\n        pass\n"  # where parentheses are not allowed
    assert len(of("change a constant", source)) == 1
    assert draw(of("change a constant", source), 5, 0, lambda path: source) == []


def test_a_module_is_imported_with_its_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "LIMIT = 3\n"
    (tmp_path / "mutated_module_of_a_test.py").write_text(source, encoding="utf-8")
    (mutant,) = mutants_of("mutated_module_of_a_test.py", source)
    monkeypatch.setattr(sys, "meta_path", [with_fault(mutant, tmp_path), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "mutated_module_of_a_test", raising=False)
    assert importlib.import_module("mutated_module_of_a_test").LIMIT == 4
    monkeypatch.delitem(sys.modules, "mutated_module_of_a_test")
