"""Training on a base in 4 bits."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, share, shortened, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "02_qlora_training.ipynb"


def test_02_forecasts_trains_saves_and_merges(tmp_path: Path) -> None:
    found = summary(execute(shortened(nbformat.read(NOTEBOOK, 4), steps=2, rows=4), tmp_path))
    assert found["trained"].endswith(" s for 2 steps")
    assert sum(name.startswith("score ") for name in found) == 6
    assert (tmp_path / "adapters" / "codes-4bit" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "codes-4bit" / "tokenizer.json").is_file()


@pytest.mark.slice
def test_02_ships_the_results_of_a_full_run() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    found = summary(notebook)
    assert found["trained"].endswith(" s for 70 steps")
    assert all(value.endswith(" of 48") for name, value in found.items() if name.startswith("score "))
    assert share(found["score 4-bit base"]) < 0.2
    for way in ("4-bit base + adapter", "merged into a copy", "4 bits, calibrated"):
        assert share(found[f"score {way}"]) >= 0.9
    assert share(found["score full precision + adapter"]) >= 0.8
    assert share(found["score merged into 4 bits"]) < 0.2
    plans = [
        output.data["text/plain"]
        for cell in notebook.cells
        if "--device T4" in cell.source and cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert "does not fit" in plans[0] and "fits" in plans[1] and "does not fit" not in plans[1]
