"""Runs notebooks in kernels and reads what they showed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
GALLERY = NOTEBOOKS / "gallery"
ADAPTED = ("adapter", "loaded", "merged")
"""What has the adapter among what notebook 01 compares."""
TASKS = ("records", "filters", "dates")
"""What the adapters of notebook 05 are for."""
LAYERS = 6
"""Layers of the model of ``shallow`` notebooks; the whole one has 30."""
PARAMETERS = {"LoRA": 4_884_480, "MiSS": 2_488_320, "OFT": 2_321_280, "(IA)³": 57_600, "VeRA": 209_280}
"""How many parameters each method of notebook 10 trains."""


def execute(notebook: Any, folder: Path, **environment: str) -> Any:
    """Runs a notebook in its own kernel, with its runs in ``folder``; environment variables shorten it."""
    environment = {"NBPEFT_RUNS": str(folder / "nbpeft_runs"), **environment}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        client = NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            store_widget_state=False,
        )
        client.execute()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return notebook


def printed(notebook: Any) -> str:
    """Everything the cells wrote to standard output."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def summary(notebook: Any) -> dict[str, str]:
    """The ``key: value`` lines of the cell tagged ``summary``."""
    cell = next(cell for cell in notebook.cells if "summary" in cell.metadata.get("tags", ()))
    lines = "".join(output.text for output in cell.outputs).splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def percent(value: str) -> float:
    return float(value.rstrip("%"))


def number(value: str) -> float:
    """What ``1,234 MB`` begins with."""
    return float(value.split()[0].replace(",", ""))


def share(value: str) -> float:
    """What ``46 of 48, …`` is as a number from 0 to 1."""
    part, _, whole = value.split(",")[0].partition(" of ")
    return int(part) / int(whole)


def best_prompted(found: Mapping[str, str]) -> float:
    """The best score of notebook 01 without the adapter, whatever is in the prompt."""
    scores = {name.removeprefix("score "): share(value) for name, value in found.items() if name.startswith("score ")}
    return max(score for name, score in scores.items() if name not in ADAPTED)


def shortened(notebook: Any, *, steps: int, rows: int) -> Any:
    """The notebook with fewer steps of training and fewer held-out rows, which one line of it says."""
    (line,) = (found for cell in notebook.cells for found in re.findall(r"^STEPS, TEST_\w+ = .*$", cell.source, re.M))
    return replaced(notebook, {line: re.sub(r"= .*", f"= {steps}, {rows}", line)})


def replaced(notebook: Any, texts: Mapping[str, str]) -> Any:
    """The notebook with texts, each of which comes once in its cells, replaced."""
    for old, new in texts.items():
        assert sum(cell.source.count(old) for cell in notebook.cells) == 1, old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    return notebook
