"""Several adapters on one model."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def test_04_mixes_switches_and_combines_adapters(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "04_many_adapters.ipynb", 4)
    found = summary(execute(notebook, tmp_path, NBPEFT_STEPS="4", NBPEFT_TEST_ORDERS="4"))
    assert found["mixed rows as alone"] == found["same answers after loading"] == "12 of 12"
    assert 0 <= float(found["largest difference of numbers"]) < 1e-3
    assert found["adapters"] == "orders, filters, dates, both"
    assert {name for name in found if name.startswith("score ties")} == {"score ties, orders", "score ties, dates"}
    for task in ("orders", "filters", "dates"):
        assert (tmp_path / "adapters" / "tasks" / task / "adapter_model.safetensors").is_file()
