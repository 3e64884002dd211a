"""Swapping in a compiled model."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def test_06_swaps_without_compiling_again(tmp_path: Path, shallow: dict[str, str]) -> None:
    notebook = nbformat.read(NOTEBOOKS / "06_hot_swapping.ipynb", 4)
    found = summary(execute(notebook, tmp_path, NBPEFT_STEPS="2", **shallow))
    assert float(found["largest difference of a logit"]) < 1e-2
    assert found["recompilations in 10 swaps"] == "0"
    assert int(found["recompilations in 1 load"]) > 0, "the counter counts nothing"
    seconds = {name: float(found[name].removesuffix(" ms")) / 1000 for name in ("swap", "load", "a pass, compiled")}
    assert 0 < seconds["swap"] < float(found["compiling"].removesuffix(" s"))
    assert float(found["saved by a swap"].removesuffix(" s")) > 0
