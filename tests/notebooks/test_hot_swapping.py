"""Swapping in a compiled model."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def test_05_swaps_without_compiling_again(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "05_hot_swapping.ipynb", 4)
    found = summary(execute(notebook, tmp_path, NBPEFT_STEPS="4", NBPEFT_TEST_ORDERS="4"))
    assert found["swaps"] == "12"
    assert found["same score as when loaded"] == "12 of 12"
    assert 0 <= float(found["largest difference of numbers"]) < 1e-2
    assert found["bad adapters refused"] == "2 of 2"
    assert found["bit for bit as before"] == "True"
    if found["compiled"] == "yes":
        assert found["recompilations"] == "0"
        assert int(found["recompilations then"]) > 0, "the counter counts nothing"
