"""Using a saved adapter."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, replaced, share, shortened, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "04_adapter_inference.ipynb"


def test_04_trains_what_is_missing_and_answers_alike_merged(tmp_path: Path, shallow: dict[str, str]) -> None:
    short = replaced(shortened(nbformat.read(NOTEBOOK, 4), steps=2, rows=4), {"in range(7):": "in range(1):"})
    found = summary(execute(short, tmp_path, **shallow))
    assert share(found["same answers merged"]) >= 0.75  # after two steps, rounding may decide between two tokens
    assert found["score merged"] == found["score adapter"]
    assert (tmp_path / "adapters" / "codes" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "codes" / "tokenizer.json").is_file()
