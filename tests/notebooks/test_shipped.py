"""The notebooks as they are committed."""

from __future__ import annotations

import re

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS

NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_notebooks_hold_results_and_no_widget_state(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / name, 4)
    assert "widgets" not in notebook.metadata
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert outputs, "run it and keep the outputs: readers see them before they run anything"
    assert not any(output.output_type == "error" for output in outputs)
    text = nbformat.writes(notebook)
    assert not re.search(r"/(root|work|tmp|home)/", text)
