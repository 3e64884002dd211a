"""The quickstart on the real model in a real browser: run, switch in the panel, stop a training."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from tests.browser.conftest import ROOT, Opener

pytestmark = [pytest.mark.browser, pytest.mark.real_model]

QUICKSTART = ROOT / "notebooks" / "01_lora_finetuning.ipynb"


def shortened(folder: Path) -> tuple[Path, dict[str, int]]:
    """The quickstart with a short training, and where its cells are among the code cells."""
    notebook = nbformat.read(QUICKSTART, 4)
    for cell in notebook.cells:
        cell.get("outputs", []).clear()
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += "\nSTEPS, TEST_ORDERS = 12, 4"
    notebook.cells.append(nbformat.v4.new_code_cell("STEPS = 5000"))
    codes = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    beginnings = {
        "panel": "%lora panel",
        "train": "%%lora_train",
        "answer": "answers(model, [my_order])",
        "longer": "STEPS =",
    }
    places = {name: index for name, start in beginnings.items() for index, s in enumerate(codes) if s.startswith(start)}
    path = folder / "quickstart.ipynb"
    nbformat.write(notebook, path)
    return path, places


def test_quickstart(open_notebook: Opener, pictures: Path, app: str, tmp_path: Path) -> None:
    path, cells = shortened(tmp_path)
    page = open_notebook(source=path)
    page.run_all(timeout=600)

    def answer() -> str:
        page.run_cell(cells["answer"])
        return re.sub(r"^\[\d+\]:\s*", "", page.output_text(cells["answer"]))

    page.click("base", cell=cells["panel"])
    base = answer()
    page.click("orders", cell=cells["panel"])
    orders = answer()
    assert base != orders
    page.click("base", cell=cells["panel"])
    assert answer() == base
    page.click("orders", cell=cells["panel"])
    page.screenshot(pictures / f"quickstart-{app}.png")
    for name in ("panel", "train"):
        page.output(cells[name]).screenshot(path=pictures / f"quickstart-{name}-{app}.png")

    page.run_cell(cells["longer"])
    page.start_cell(cells["train"])
    page.wait_for(re.compile(r"^[1-9][\d,]* / 5,000$"), cell=cells["train"], timeout=120)
    page.screenshot(pictures / f"quickstart-training-{app}.png")
    page.click("Stop", cell=cells["train"])
    page.wait_for(re.compile("^stopped$"), cell=cells["train"], timeout=60)
    page.wait_idle()
    page.check()
    assert answer() != base
