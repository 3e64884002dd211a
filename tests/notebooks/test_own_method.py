"""A method of one's own."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import LAYERS, NOTEBOOKS, execute, shortened, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "07_your_own_method.ipynb"


def test_07_trains_saves_loads_and_merges_the_method(tmp_path: Path, shallow: dict[str, str]) -> None:
    notebook = execute(shortened(nbformat.read(NOTEBOOK, 4), steps=2, rows=2), tmp_path, **shallow)
    found = summary(notebook)
    assert found["score MoRA"] == found["score MoRA loaded"] == found["score MoRA merged"]
    assert found["parameters mora"] == f"{7 * LAYERS * 96 * 96:,}"
    assert (tmp_path / "adapters" / "mora" / "adapter_model.safetensors").is_file()
    compared = next(cell for cell in notebook.cells if cell.source.startswith("%lora compare"))
    page = "".join(output.data.get("text/html", "") for output in compared.outputs)
    assert all(name in page for name in ("base", "lora", "mora"))
