"""Tab and Shift+Tab in a cell: the popup of values, and the tooltip of a field, a verb and an option."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect

from tests.browser.conftest import Opener
from tests.browser.harness import NotebookPage

pytestmark = pytest.mark.browser

MODEL = """\
%load_ext nbpeft
from tests.tiny_models import llama
model = llama()
"""
TARGETS = "%%lora model --name sql\nr = 8\ntarget_modules = ['"
DEVICE = "%lora plan model --device "
SCHEDULER = "%%lora_train model --data rows\nlr_scheduler_type = '"
FIELD = "%%lora model --name sql\nlora_alpha = 16"
VERB = "%lora compare"
OPTION = "%lora plan model --packing"


def at_the_end(page: NotebookPage, cell: int) -> None:
    page.page.locator(".jp-CodeCell").nth(cell).locator(".cm-content").click()
    page.page.keyboard.press("Control+End")


def popup(page: NotebookPage, cell: int) -> Locator:
    """What Tab offers at the end of a cell."""
    at_the_end(page, cell)
    items = page.page.locator(".jp-Completer:visible .jp-Completer-item")
    page.page.keyboard.press("Tab")  # once: JupyterLab waits a second for an answer, and drops one that comes later
    expect(items.first).to_be_visible(timeout=10_000)
    return items


def tooltip(page: NotebookPage, cell: int) -> Locator:
    """What Shift+Tab shows at the end of a cell."""
    at_the_end(page, cell)
    page.page.keyboard.press("Shift+Tab")
    shown = page.page.locator(".jp-Tooltip:visible")
    expect(shown).to_be_visible(timeout=10_000)
    return shown


def source(page: NotebookPage, cell: int) -> str:
    return str(page.page.evaluate("cell => window.nb.code()[cell].model.sharedModel.getSource()", cell))


def labels(items: Locator) -> list[str]:
    return [text.strip().strip("'") for text in items.locator(".jp-Completer-match").all_inner_texts()]


def test_tab_offers_values(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(MODEL, TARGETS, DEVICE, SCHEDULER)
    page.run_cell(0)
    assert {"cosine", "linear"} <= set(labels(popup(page, 3)))
    page.page.screenshot(path=pictures / f"tab-scheduler-{app}.png")
    page.page.keyboard.press("Escape")
    items = popup(page, 1)
    assert {"q_proj", "v_proj", "down_proj"} <= set(labels(items))
    page.page.screenshot(path=pictures / f"tab-targets-{app}.png")
    items.filter(has_text="q_proj").click()
    assert source(page, 1) == f"{TARGETS}q_proj'"
    items = popup(page, 2)
    for name in ("T4", "L4", "H100"):  # JupyterLab draws a long list piece by piece
        expect(items.get_by_text(name, exact=True)).to_be_visible()
    page.page.screenshot(path=pictures / f"tab-device-{app}.png")
    items.get_by_text("T4", exact=True).click()
    assert source(page, 2) == f"{DEVICE}T4"


def test_shift_tab_explains(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(MODEL, FIELD, VERB, OPTION)
    page.run_cell(0)
    for cell, words in ((1, "lora_alpha: "), (2, "--max-new-tokens"), (3, "--packing")):
        shown = tooltip(page, cell)
        expect(shown).to_contain_text(words)
        page.page.screenshot(path=pictures / f"tooltip-{cell}-{app}.png")
        page.page.keyboard.press("Escape")
        expect(shown).to_have_count(0)
