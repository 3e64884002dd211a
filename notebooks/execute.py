"""Executes one notebook in a fresh kernel and tells what it showed. Run by ``run.py``.

A cell tagged ``summary`` that prints ``key: value`` lines gives the summary at the end.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from environment import duration
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbconvert import HTMLExporter

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_KEY_VALUE = re.compile(r"^\s*([\w][\w %/().,→+-]{0,60}?)\s*: +(\S.*)$")


def main() -> int:
    """Executes, saves notebook and HTML also after an error, and prints the summary."""
    parser = argparse.ArgumentParser()
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--timeout", type=int, default=1800)
    arguments = parser.parse_args()
    notebook = nbformat.read(arguments.notebook, as_version=4)
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    print(f"› executing {arguments.notebook.name} in a fresh kernel", flush=True)
    error = execute(notebook, arguments.notebook.parent, arguments.timeout)
    executed = arguments.out / arguments.notebook.name
    nbformat.write(notebook, executed)
    page = executed.with_suffix(".html")
    html, _ = HTMLExporter(template_name="lab", embed_images=True).from_notebook_node(without_widgets(notebook))
    page.write_text(html, encoding="utf-8")
    print()
    if error is None:
        print_summary(summary(notebook))
    else:
        print(f"The notebook stopped with an error:\n\n{_ANSI.sub('', error)}\n", file=sys.stderr)
    print(f"executed notebook  {executed}")
    print(f"as a page          {page}")
    print(f"took               {duration(time.monotonic() - start)}")
    return 0 if error is None else 1


def execute(notebook: Any, folder: Path, timeout: int, *, kernel_name: str = "python3") -> str | None:
    """Runs all cells and keeps their outputs in ``notebook``.

    Args:
        notebook: changed in place.
        folder: working directory of the kernel.
        timeout: seconds one cell may take.
        kernel_name: the kernel that runs them.

    Returns:
        None, or what went wrong.
    """
    codes = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]

    def began(cell: Any, cell_index: int) -> None:
        if cell_index in codes:
            first_line = cell.source.strip().splitlines()[0]
            print(f"  [{codes.index(cell_index) + 1}/{len(codes)}] {first_line[:90]}", flush=True)

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name=kernel_name,
        resources={"metadata": {"path": str(folder)}},
        on_cell_start=began,
    )
    try:
        client.execute()
    except (CellControlSignal, DeadKernelError) as error:
        return str(error)
    return None


def without_widgets(notebook: Any) -> Any:
    """A copy in which what has a static form besides its widgets shows that; a page has no kernel for them."""
    page = copy.deepcopy(notebook)
    for cell in page.cells:
        for output in cell.get("outputs", ()):
            if "text/html" in output.get("data", ()):
                output["data"].pop(_WIDGET_VIEW, None)
    return page


def summary(notebook: Any) -> list[tuple[str, str]]:
    """The ``key: value`` lines of the cells tagged ``summary``, or of the last cell that printed any."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in cells if "summary" in cell.metadata.get("tags", [])]
    if tagged:
        return [pair for cell in tagged for pair in key_values(cell)]
    return next((pairs for pairs in map(key_values, reversed(cells)) if pairs), [])


def key_values(cell: Any) -> list[tuple[str, str]]:
    """The ``key: value`` lines among the text that a cell showed, in their order."""
    texts = [
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
        if output.output_type == "stream" or "data" in output
    ]
    matches = [_KEY_VALUE.match(_ANSI.sub("", line)) for text in texts for line in text.splitlines()]
    return [(match[1], match[2].rstrip()) for match in matches if match]


def print_summary(pairs: list[tuple[str, str]]) -> None:
    """Prints the pairs as two columns."""
    width = max((len(key) for key, _ in pairs), default=0)
    for key, value in pairs:
        print(f"{key:<{width}}  {value}")
    if pairs:
        print()


if __name__ == "__main__":
    sys.exit(main())
