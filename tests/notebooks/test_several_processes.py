"""From a notebook to several processes."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, percent, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def test_07_trains_in_two_processes_and_loads_what_they_learned(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "07_several_processes.ipynb", 4)
    found = summary(execute(notebook, tmp_path, NBPEFT_STEPS="2", NBPEFT_TEST_ORDERS="4"))
    assert {name for name in found if name.startswith("score")} == {
        "score base model",
        "score notebook",
        "score two processes",
    }
    launched = next(cell for cell in notebook.cells if "torch.distributed.run" in cell.source)
    assert "dates finished · 2 steps" in "".join(output.text for output in launched.outputs)
    assert (tmp_path / "train_output" / "dates" / "adapter_model.safetensors").is_file()


@pytest.mark.slice
def test_07_ships_the_results_of_a_full_run() -> None:
    found = summary(nbformat.read(NOTEBOOKS / "07_several_processes.ipynb", 4))
    base, notebook, processes = (
        percent(found[f"score {name}"]) for name in ("base model", "notebook", "two processes")
    )
    assert notebook > base + 20 and processes > base + 20
