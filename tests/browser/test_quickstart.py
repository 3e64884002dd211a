"""The quickstart on the real model in a real browser: run, switch in the panel, stop a training."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Opener
from tests.notebooks.support import NOTEBOOKS, shortened

pytestmark = [pytest.mark.browser, pytest.mark.real_model]


# Numbers, since after a short training the text may still be the base model's.
ANSWER = """question = tokenizer("s h e l t e r =", return_tensors="pt")
print(model(**question).logits[0, -1].topk(4).values.tolist())"""


def with_panel(folder: Path) -> tuple[Path, dict[str, int]]:
    """The quickstart with a short training and the adapters' panel, and where its cells are among the code cells.

    Cells that score other prompts and a second model are left out: ``tests/notebooks`` runs them.
    """
    notebook = shortened(nbformat.read(NOTEBOOKS / "01_lora_finetuning.ipynb", 4), steps=12, rows=2)
    notebook.cells = [cell for cell in notebook.cells if not re.search(r"\b(results|fresh)\b", cell.source)]
    for cell in notebook.cells:
        cell.get("outputs", []).clear()
    added = ("%lora panel", ANSWER, "STEPS = 5000")
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in added]
    codes = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    beginnings = {"train": "%%lora_train", "panel": "%lora panel", "answer": ANSWER, "longer": "STEPS ="}
    places = {name: index for name, start in beginnings.items() for index, s in enumerate(codes) if s.startswith(start)}
    places["compare"] = next(index for index, source in enumerate(codes) if source.endswith("--panel"))
    path = folder / "quickstart.ipynb"
    nbformat.write(notebook, path)
    return path, places


def test_quickstart(open_notebook: Opener, pictures: Path, app: str, tmp_path: Path) -> None:
    path, cells = with_panel(tmp_path)
    page = open_notebook(source=path)
    page.run_all(timeout=600)

    def answer() -> str:
        page.run_cell(cells["answer"])
        return page.output_text(cells["answer"])

    def switch(name: str) -> None:
        page.click(name, cell=cells["panel"])
        # JupyterLab sends clicks over a subshell of the kernel, which does not wait for cells, nor they for it.
        expect(page.button(name, cell=cells["panel"]).first).to_have_class(re.compile(r"\bnbpeft-on\b"))

    switch("base")
    base = answer()
    switch("sounds")
    sounds = answer()
    assert base != sounds
    switch("base")
    assert answer() == base
    switch("sounds")
    page.screenshot(pictures / f"quickstart-{app}.png")
    for name in ("panel", "train"):
        page.output(cells[name]).screenshot(path=pictures / f"quickstart-{name}-{app}.png")

    page.click("Send", cell=cells["compare"])
    page.wait_for("answered in", cell=cells["compare"], timeout=120)
    page.output(cells["compare"]).screenshot(path=pictures / f"quickstart-compare-{app}.png")

    page.run_cell(cells["longer"])
    page.start_cell(cells["train"])
    page.wait_for(re.compile(r"^[1-9][\d,]* / 5,000$"), cell=cells["train"], timeout=120)
    page.screenshot(pictures / f"quickstart-training-{app}.png")
    page.click("Stop", cell=cells["train"])
    page.wait_for(re.compile("^stopped$"), cell=cells["train"], timeout=60)
    page.wait_idle()
    page.check()
    assert answer() != base
