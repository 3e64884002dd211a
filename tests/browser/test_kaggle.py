"""A notebook saved as Kaggle saves a version: all cells run without a front end, in two processes, and become a page.

The page has neither a kernel nor the state of widgets (ipywidgets#2360). The two processes stand for two cards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import Page, expect

from tests.browser.harness import WIDGET_ERRORS, Browser
from tests.browser.vscode import block_others
from tests.notebooks.support import execute, printed
from tests.wheels import ROOT

pytestmark = pytest.mark.browser

CELLS = (
    f"""%load_ext nbpeft
import sys
sys.path.append({str(ROOT)!r})
import torch
from tests.tiny_models import llama
torch.set_num_threads(1)
model = llama()
rows = [{{"input_ids": [1 + (step * start) % 7 for step in range(12)]}} for start in range(16)]
%lora add model --name orders r=4 target_modules=all-linear task_type=CAUSAL_LM""",
    """%%lora_train model --data rows --processes 2
max_steps = 3
per_device_train_batch_size = 2
learning_rate = 1e-2
logging_steps = 1""",
    """result = %lora watch --wait
print("losses:", len(result.state.history), "changed:", bool(model.manager.parameters("orders")[1].abs().sum() > 0))""",
    "%lora panel",
    "%lora runs",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The executed notebook, without the state of widgets."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    return execute(notebook, tmp_path_factory.mktemp("kaggle"), KAGGLE_KERNEL_RUN_TYPE="Batch")


@pytest.fixture
def page(saved: Any, browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """The notebook as a page, in a browser that reaches no other machine."""
    html, _ = HTMLExporter().from_notebook_node(saved)
    (tmp_path / "version.html").write_text(html, encoding="utf-8")
    page = browser.new_page()
    block_others(page)
    page.goto((tmp_path / "version.html").as_uri(), wait_until="domcontentloaded")
    yield page
    page.close()


def test_two_processes_train_from_a_notebook(saved: Any) -> None:
    assert "losses: 3 changed: True" in printed(saved)
    shown = str([cell.outputs for cell in saved.cells])
    assert "2 processes, which read the model from a file" in shown


def test_its_page_shows_cards_and_panels(page: Page, pictures: Path, saved: Any) -> None:
    assert "widgets" not in saved.metadata
    page.screenshot(path=pictures / "kaggle-version.png", full_page=True)
    outputs = page.locator(".jp-CodeCell").nth(1)
    expect(outputs.get_by_text("Training orders")).to_be_visible()
    expect(outputs.get_by_text("finished", exact=True)).to_be_visible()
    expect(page.locator(".jp-CodeCell").nth(3).locator(".nbpeft-state")).to_contain_text("active")
    expect(page.locator(".jp-CodeCell").nth(4)).to_contain_text("orders-1")
    text = page.locator("body").inner_text()
    assert "VBox" not in text and not any(words in text for words in WIDGET_ERRORS)
