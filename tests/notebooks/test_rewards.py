"""Rewards for answers of the model's own."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, percent, printed, replaced, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "12_rewards.ipynb"


def test_12_learns_from_two_checks(tmp_path: Path, shallow: dict[str, str]) -> None:
    steps = "STEPS, TEST_ROWS = 16, 32"
    notebook = execute(replaced(nbformat.read(NOTEBOOK, 4), {steps: "STEPS, TEST_ROWS = 1, 2"}), tmp_path, **shallow)
    said = printed(notebook)
    assert said.count(" points, advantage ") == 8
    assert "rewards/brief/mean: " in said and "rewards/right/mean: " in said
    found = summary(notebook)
    for way in ("sampled", "greedy"):
        for name in ("base", "capitals"):
            for metric in ("is_brief", "is_right"):
                assert 0 <= percent(found[f"{metric}, {way}, {name}"].split(" (")[0]) <= 100
