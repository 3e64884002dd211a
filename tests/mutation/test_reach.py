"""The tests that may notice a fault, the likeliest first."""

from __future__ import annotations

import dataclasses

import pytest

from tests.mutation.mutants import Mutant
from tests.mutation.reach import Reached

OWN, OTHER = "tests/test_area.py::test_own", "tests/test_other.py::test_other"
SECONDS = {f"{OWN}[1]": 0.2, f"{OWN}[2]": 0.1, OTHER: 0.01, f"{OTHER}_one": 0.5, "tests/test_x.py::test_x": 0.3}
REACHING = [f"{OWN}[1]", f"{OWN}[2]", OTHER, f"{OTHER}_one", "a test that fails"]
CONTEXTS: dict[int, list[str]] = {1: [""], 2: ["", OTHER], 3: REACHING}
MUTANT = Mutant("nbpeft/area.py", "flip a sign", (3, 3), 0, "-1", "(1)", in_function=True)


@pytest.fixture
def reached() -> Reached:
    made = object.__new__(Reached)
    made.seconds, made._contexts = SECONDS, {MUTANT.path: CONTEXTS}
    return made


def test_own_tests_and_quick_ones_are_first_and_one_case_of_each(reached: Reached) -> None:
    assert reached.tests(MUTANT) == [f"{OWN}[2]", OTHER, f"{OTHER}_one", f"{OWN}[1]"]


@pytest.mark.parametrize(("line", "in_function", "count"), [(2, True, 1), (1, True, 5), (1, False, 4), (9, True, 0)])
def test_what_runs_at_import_is_reached_by_all_that_import_it(
    reached: Reached, line: int, in_function: bool, count: int
) -> None:
    mutant = dataclasses.replace(MUTANT, lines=(line, line), in_function=in_function)
    assert len(reached.tests(mutant)) == count
