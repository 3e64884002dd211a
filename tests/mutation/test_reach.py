"""The tests that may notice a fault, the likeliest first."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.mutation import marks
from tests.mutation.mutants import Mutant
from tests.mutation.reach import Reached

SOURCE = "def area(width):\n    size = (\n        -1\n    )\n    return size\n"
OWN, OTHER = "tests/test_area.py::test_own", "tests/test_other.py::test_other"
SECONDS = {f"{OWN}[1]": 0.2, f"{OWN}[2]": 0.1, OTHER: 0.01, f"{OTHER}_one": 0.5, "tests/test_x.py::test_x": 0.3}
LINES = {2: [*SECONDS][:4], 5: [OTHER]}
MUTANT = Mutant("nbpeft/area.py", "flip a sign", (3, 3), 0, "-1", "(1)", in_function=True)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Reached:
    made = object.__new__(Reached)
    lines = np.array([[test in LINES.get(line, ()) for line in range(7)] for test in SECONDS])
    made._left_out = {"a test that fails"}
    made.seconds, made._reaching = SECONDS, {MUTANT.path: [([*SECONDS], lines)]}
    monkeypatch.setattr(marks, "read", lambda path: SOURCE)
    return made


def test_own_tests_and_quick_ones_are_first_and_one_case_of_each(reached: Reached) -> None:
    assert reached.tests(MUTANT) == [f"{OWN}[2]", OTHER, f"{OTHER}_one", f"{OWN}[1]"]


@pytest.mark.parametrize(("line", "in_function", "count"), [(5, True, 1), (1, True, 4), (1, False, 4)])
def test_what_runs_at_import_is_reached_by_all_that_run_anything_of_the_file(
    reached: Reached, line: int, in_function: bool, count: int
) -> None:
    mutant = dataclasses.replace(MUTANT, lines=(line, line), in_function=in_function)
    assert len(reached.tests(mutant)) == count


def test_each_statement_leaves_a_mark_and_keeps_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    source = '"""Text."""\nfrom __future__ import annotations\nif 1:\n    x = 2\nelse:\n    x = 3\nraise ValueError\n'
    monkeypatch.setattr(marks, "read", lambda path: source)
    memory = bytearray(20)
    with pytest.raises(ValueError) as error:
        exec(marks.marked("nbpeft/area.py", 10), {marks.MARKS: memory})
    assert [number for number, mark in enumerate(memory) if mark] == [13, 14, 17]
    assert error.tb.tb_next.tb_lineno == 7
