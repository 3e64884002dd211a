"""Training on a base in 4 bits."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, shortened, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "03_qlora_training.ipynb"


def test_03_forecasts_trains_saves_and_merges(tmp_path: Path, shallow: dict[str, str]) -> None:
    found = summary(execute(shortened(nbformat.read(NOTEBOOK, 4), steps=2, rows=4), tmp_path, **shallow))
    assert found["trained"].endswith(" s for 2 steps")
    assert sum(name.startswith("score ") for name in found) == 6
    assert (tmp_path / "adapters" / "codes-4bit" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "codes-4bit" / "tokenizer.json").is_file()
