"""The gallery: short notebooks that start from a file, each with few steps and few rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.notebooks.support import GALLERY, execute, percent, summary

MOST_CELLS = 11
METRICS = {
    "classify_messages": ("choice",),
    "extract_fields": ("json", "exact"),
    "house_style": ("signed", "brief", "plain"),
    "tool_call": ("right_call", "right_tool"),
}
"""Notebook -> the metrics by which it is scored."""
ADAPTERS = {"classify_messages": "team", "extract_fields": "fields", "house_style": "style", "tool_call": "tools"}


def committed(name: str) -> Any:
    return nbformat.read(GALLERY / f"{name}.ipynb", 4)


def value(found: dict[str, str], metric: str, name: str) -> float:
    return percent(found[f"{metric}, {name}"].split(" (")[0])


def test_each_notebook_is_tested() -> None:
    assert {path.stem for path in GALLERY.glob("*.ipynb")} == METRICS.keys() == ADAPTERS.keys()


@pytest.mark.parametrize("name", METRICS)
def test_it_ships_the_results_of_a_full_run(name: str) -> None:
    notebook = committed(name)
    assert len(notebook.cells) <= MOST_CELLS
    found = summary(notebook)
    first, *_ = METRICS[name]
    assert value(found, first, ADAPTERS[name]) > value(found, first, "base") + 30
    assert float(found["processor time"].removesuffix(" s")) < 300
    plans = [
        output.data["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code" and "--device T4" in cell.source
        for output in cell.outputs
    ]
    assert plans and "does not fit" not in plans[0] and "fits" in plans[0]


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("name", METRICS)
def test_it_runs(name: str, tmp_path: Path, shallow: dict[str, str]) -> None:
    notebook = committed(name)
    (cell,) = (cell for cell in notebook.cells if "STEPS, TEST_ROWS = " in cell.source)
    cell.source = re.sub(r"STEPS, TEST_ROWS = .*", "STEPS, TEST_ROWS = 1, 2", cell.source)
    found = summary(execute(notebook, tmp_path, **shallow))
    for metric in METRICS[name]:
        for adapter in ("base", ADAPTERS[name]):
            assert 0 <= value(found, metric, adapter) <= 100
    assert found["rows"].endswith(" 2 held out")
    (file,) = (path for path in tmp_path.iterdir() if path.is_file())
    assert f'FILE = "{file.name}"' in cell.source
