"""The README's quickstart, pasted into an empty notebook in the order printed: it shows what is printed beneath."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from nbpeft import examples
from tests.notebooks.support import execute
from tests.published import FENCE, text_of

README = Path(__file__).resolve().parent.parent / "README.md"
SECTIONS = ("Quickstart with your model", "With your CSV", "In 4 bits")
pytestmark = [pytest.mark.slow, pytest.mark.slice, pytest.mark.real_model, pytest.mark.timeout(1200)]


def cells() -> list[tuple[str, str]]:
    """The code of each cell of these sections, and what the README prints beneath it; empty if it prints nothing."""
    found: list[tuple[str, str]] = []
    for section in SECTIONS:
        text = text_of(README).partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        for fence in FENCE.finditer(text):
            if fence[2] == "python":
                found.append((fence[3].strip(), ""))
            else:
                found[-1] = (found[-1][0], fence[3].strip())
    return found


def in_hub_cache(folder: Path) -> Path:
    """A cache of the Hub that has the small model under its name, so that nothing is downloaded."""
    repository = folder / f"models--{examples.HUB_NAME.replace('/', '--')}"
    for name in ("refs", "snapshots"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    (repository / "snapshots" / ("0" * 40)).symlink_to(examples.small_model_path())
    return folder


def shown(cell: Any) -> str:
    texts = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    return "\n".join(texts)


def within_interval(line: str, found: str) -> bool:
    """Whether a score is in the printed interval: what a training learns differs by a word on another processor."""
    printed = re.fullmatch(r"(\w+) [\d.]+ % (\d+)–(\d+) %", line)
    score = printed and re.search(rf"\b{printed[1]} ([\d.]+) % ", found)
    return bool(printed and score and float(printed[2]) <= float(score[1]) <= float(printed[3]))


def test_each_cell_shows_what_is_printed_beneath_it(tmp_path: Path) -> None:
    with (tmp_path / "my.csv").open("w", newline="", encoding="utf-8") as file:
        rows = (
            (f"{city} needs {count} lamps.", f"lamps x {count}, {city}")
            for city in ("Oslo", "Rome")
            for count in range(2, 12)
        )
        csv.writer(file).writerows([("Message", "Order"), *rows])
    printed = cells()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code, _ in printed])
    cache = {"HF_HUB_CACHE": str(in_hub_cache(tmp_path / "hub")), "HF_HUB_OFFLINE": "1"}
    execute(notebook, tmp_path, **cache)
    for cell, (code, expected) in zip(notebook.cells, printed, strict=True):
        found = re.sub(r"\s+", " ", shown(cell))
        for line in filter(None, map(str.strip, expected.splitlines())):
            line = re.sub(r"\s+", " ", line)
            pattern = ".*".join(map(re.escape, line.split("…")))
            assert re.search(pattern, found) or within_interval(line, found), f"{code}\nshows\n{found}\nand not\n{line}"
    assert sum(bool(expected) for _, expected in printed) == 4
    assert (tmp_path / "adapters" / "orders" / "adapter_model.safetensors").is_file()
