"""Preferences after supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, printed, replaced, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "11_preferences.ipynb"
SHORTER = {
    "STEPS, PREFERENCE_STEPS, TEST_ORDERS = 24, 10, 48": "STEPS, PREFERENCE_STEPS, TEST_ORDERS = 2, 1, 2",
    "for _ in range(64)]": "for _ in range(8)]",
    "return says_no_day(answer, row) and repeats(answer, row)": "return answer == row.setdefault('first', answer)",
    "--max-new-tokens 20 --general": "--max-new-tokens 20 --also asked",
}
"""After two steps no answer is good, so the first one to each order counts as good."""


def test_11_trains_on_pairs_of_its_own_answers(tmp_path: Path, shallow: dict[str, str]) -> None:
    notebook = execute(replaced(nbformat.read(NOTEBOOK, 4), SHORTER), tmp_path, **shallow)
    said = printed(notebook)
    assert "objective: dpo" in said and "reference: start" in said
    found = summary(notebook)
    assert 4 < int(found["pairs"]) <= 8  # two answers, drawn at temperature 1, are seldom the same
    for name in ("base", "replies", "preferred", "chosen_only"):
        assert found[f"repeats, {name}"].endswith(" of 2") and found[f"says_no_day, {name}"].endswith(" of 2")
        assert float(found[f"loss on general text, {name}"]) > 0
