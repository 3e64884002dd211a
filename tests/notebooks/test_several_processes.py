"""From a notebook to several processes."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def test_08_trains_in_two_processes_and_has_what_they_learned(tmp_path: Path, shallow: dict[str, str]) -> None:
    notebook = nbformat.read(NOTEBOOKS / "08_several_processes.ipynb", 4)
    notebook = execute(notebook, tmp_path, NBPEFT_STEPS="2", NBPEFT_TEST_ORDERS="4", **shallow)
    found = summary(notebook)
    assert {name for name in found if name.startswith("score")} == {
        "score base",
        "score dates",
        "score two_processes",
    }
    assert float(found["largest difference of a loss"]) < 1e-3
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert "2 processes, which read the model from a file" in shown
    assert (tmp_path / "train.py").is_file()
