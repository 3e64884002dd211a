"""Runs notebooks in kernels and reads what they showed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def execute(notebook: Any, folder: Path, **environment: str) -> Any:
    """Runs a notebook in its own kernel; environment variables shorten it."""
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


def shortened(name: str, **values: object) -> Any:
    """A notebook in which some of the names that its cell tagged ``parameters`` sets have other values."""
    notebook = nbformat.read(NOTEBOOKS / name, 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    for key, value in values.items():
        cell.source, found = re.subn(rf"^{key} = .*$", f"{key} = {value!r}", cell.source, flags=re.MULTILINE)
        assert found == 1, f"{name} does not set {key} in a line of its own"
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


def count(value: str) -> int:
    """The first number of ``47 of 48``."""
    return int(value.split(" of ")[0])


def percent(value: str) -> float:
    return float(value.rstrip("%"))
