"""Several adapters on one model."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, TASKS, execute, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def test_05_switches_mixes_and_merges_adapters(tmp_path: Path, shallow: dict[str, str]) -> None:
    notebook = nbformat.read(NOTEBOOKS / "05_many_adapters.ipynb", 4)
    found = summary(execute(notebook, tmp_path, NBPEFT_STEPS="2", NBPEFT_TEST_ORDERS="4", **shallow))
    assert float(found["largest difference of a logit, mixed and alone"]) < 1e-4
    names = ("base model", *TASKS, "mixed batch")
    scores = {f"score {name}, {task}" for name in names for task in TASKS}
    scores |= {f"score {kind}, {task}" for kind in ("exact", "ties") for task in ("records", "dates")}
    assert {name for name in found if name.startswith("score")} == scores
    for task in TASKS:
        assert (tmp_path / "adapters" / "tasks" / task / "adapter_model.safetensors").is_file()
