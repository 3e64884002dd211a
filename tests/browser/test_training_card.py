"""A training's card while its page is closed and opened again, after its kernel has ended, and under the mouse."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import Opener
from tests.browser.harness import WIDGET_ERRORS, NotebookPage
from tests.browser.test_background import MODEL, TRAIN

pytestmark = pytest.mark.browser

SAVE = "%lora save adapters/sql --adapter sql"
LEFT = "node => Math.round(node.getBoundingClientRect().left)"
STEPS = re.compile(r"^[1-9][\d,]* / 20,000$")


def card(page: NotebookPage) -> Locator:
    """The cards of the training that are seen; one, whether in a widget or in HTML."""
    return page.output(1).get_by_text("Training sql on rows", exact=True).filter(visible=True)


def steps(page: NotebookPage) -> int:
    return int(page.output(1).get_by_text(STEPS).filter(visible=True).inner_text().partition(" ")[0].replace(",", ""))


def shows_no_dead_widget(page: NotebookPage) -> None:
    expect(card(page)).to_have_count(1)
    for words in WIDGET_ERRORS:
        assert page.page.get_by_text(words).filter(visible=True).count() == 0
    assert page.button("Stop").filter(visible=True).count() == 0


def values_under_the_mouse(page: Page, area: Locator) -> list[str]:
    """What is shown beside the crosshair at the left and at the right of a chart; empty where nothing is."""
    columns = area.locator(".nbpeft-at").filter(visible=True)
    shown = []
    for place in (0, columns.count() - 1):
        columns.nth(place).hover(force=True)
        read = (
            "() => [...document.querySelectorAll('.nbpeft-at:hover')].map(e => getComputedStyle(e, '::after').content)"
        )
        page.wait_for_function(f"({read})().length > 0")
        shown += page.evaluate(read)
    return shown


def pictures_of(page: NotebookPage, folder: Path, name: str) -> None:
    for theme in ("light", "dark"):
        page.theme(theme)
        for width in (1280, 600):
            page.page.set_viewport_size({"width": width, "height": 1000})
            page.screenshot(folder / f"{name}-{width}-{theme}.png")
    page.theme("light")
    page.page.set_viewport_size({"width": 1280, "height": 1000})


def test_a_page_that_is_opened_again_follows_the_run(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(MODEL, TRAIN, SAVE, "%lora watch", "%lora")
    page.run_cell(0)
    page.run_cell(1)
    page.wait_for(STEPS, cell=1, timeout=60)
    expect(card(page)).to_have_count(1)
    page.save()
    page.page.goto("about:blank")  # the tab is closed, the kernel trains on
    page.reopen()
    page.wait_for(STEPS, cell=1, timeout=60)
    expect(card(page)).to_have_count(1)
    seen = steps(page)
    deadline = time.monotonic() + 60
    while steps(page) <= seen:
        assert time.monotonic() < deadline, "the card stands still"
    assert "loss" in values_under_the_mouse(page.page, page.output(1))[1], "while it runs"
    pictures_of(page, pictures, f"card-running-{app}")
    page.click("Pause", cell=1)
    page.wait_for(re.compile("^paused$"), cell=1)
    deadline = time.monotonic() + 20
    first = last = ""
    while "learning rate" not in last and time.monotonic() < deadline:  # the paused card may be drawn once more
        first, last = values_under_the_mouse(page.page, page.output(1))
    assert "step" in first and "smoothed" in last and "learning rate" in last
    page.screenshot(pictures / f"card-crosshair-{app}.png")
    page.run_cell(4)
    assert "training sql paused: step" in page.output_text(4)
    page.click("Stop", cell=1)
    page.wait_for(re.compile("^stopped$"), cell=1)
    page.wait_for("not saved", cell=1)
    expect(card(page)).to_have_count(1)
    page.run_cell(2)
    page.wait_for("✓ saved", cell=1)
    page.run_cell(3)
    assert "Training sql" in page.output_text(3) and "✓ saved" in page.output_text(3)
    pictures_of(page, pictures, f"card-stopped-{app}")


def test_a_card_without_its_kernel_says_when_it_was_seen(
    open_notebook: Opener, pictures: Path, app: str, tmp_path: Path
) -> None:
    page = open_notebook(MODEL, TRAIN)
    page.run_cell(0)
    page.run_cell(1)
    page.wait_for(STEPS, cell=1, timeout=60)
    page.page.wait_for_timeout(4500)  # the card that is saved follows within two seconds
    page.save()
    page.page.evaluate("async () => { await window.nb.panel().sessionContext.shutdown(); }")
    page.reopen()
    page.page.wait_for_timeout(1000)
    shows_no_dead_widget(page)
    assert re.search(r"last seen \S+ \d\d:\d\d, step [1-9][\d,]* of 20,000", page.output_text(1))
    assert "loss" in values_under_the_mouse(page.page, page.output(1))[1]
    pictures_of(page, pictures, f"card-without-kernel-{app}")
    target = tmp_path / "page.html"
    command = [sys.executable, "-m", "nbconvert", "--to", "html", str(page.file), "--output", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    exported = page.page.context.new_page()
    try:
        exported.goto(target.as_uri())
        text = exported.locator("body").inner_text()
        assert "last seen" in text and "Error displaying" not in text and "VBox" not in text
        assert "loss" in values_under_the_mouse(exported, exported.locator("body"))[1]
        added, trained = (
            exported.get_by_text(words, exact=True).first for words in ("sql: added", "Training sql on rows")
        )
        assert trained.evaluate(LEFT) == added.evaluate(LEFT), "cards are aligned"
        exported.screenshot(path=str(pictures / f"card-exported-{app}.png"), full_page=True)
    finally:
        exported.close()
