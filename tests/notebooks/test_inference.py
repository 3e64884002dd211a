"""Using a saved adapter."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, share, shortened, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "03_adapter_inference.ipynb"


def test_03_trains_what_is_missing_and_answers_alike_merged(tmp_path: Path) -> None:
    found = summary(execute(shortened(nbformat.read(NOTEBOOK, 4), steps=2, rows=4), tmp_path))
    assert found["same answers merged"] == "4 of 4"
    assert found["score merged"] == found["score adapter"]
    assert (tmp_path / "adapters" / "codes" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "codes" / "tokenizer.json").is_file()


@pytest.mark.slice
def test_03_ships_the_results_of_a_full_run() -> None:
    found = summary(nbformat.read(NOTEBOOK, 4))
    assert share(found["score base model"]) < 0.2
    assert share(found["score adapter"]) >= 0.9
    assert found["score merged"] == found["score adapter"]
    assert found["same answers merged"] == "48 of 48"
    speed = {name: float(found[f"speed {name}"].split()[0]) for name in ("with adapter", "merged")}
    assert speed["with adapter"] < speed["merged"]
