"""Five methods on one task."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, percent, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "09_choosing_a_method.ipynb"
METHODS = ("LoRA", "OFT", "MiSS", "VeRA", "IA3")


def test_09_trains_five_methods_and_converts_one(tmp_path: Path) -> None:
    notebook, full = nbformat.read(NOTEBOOK, 4), "STEPS, TEST_ORDERS = 20, 24"
    changed = [cell for cell in notebook.cells if full in cell.source]
    assert len(changed) == 1
    changed[0].source = changed[0].source.replace(full, "STEPS, TEST_ORDERS = 1, 2")
    found = summary(execute(notebook, tmp_path))
    assert {name for name in found if name.startswith("score")} == {
        f"score {name}" for name in (*METHODS, "OFT as LoRA")
    }
    for name in METHODS:
        parameters, memory, seconds = found[f"cost {name}"].split(", ")
        assert parameters.endswith(" parameters") and memory.endswith(" MB") and seconds.endswith(" s a step")


@pytest.mark.slice
def test_09_ships_the_results_of_a_full_run() -> None:
    found = summary(nbformat.read(NOTEBOOK, 4))
    scores = {name: percent(found[f"score {name}"].replace(" ", "")) for name in METHODS}
    assert scores["LoRA"] > 50
    parameters = {name: int(found[f"cost {name}"].split()[0].replace(",", "")) for name in METHODS}
    assert parameters["LoRA"] > parameters["OFT"] > 10 * parameters["VeRA"]
