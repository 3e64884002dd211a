"""What is left of a panel in a notebook that is saved, opened with a new kernel, not trusted, or converted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect

from tests.browser.conftest import Opener
from tests.browser.harness import WIDGET_ERRORS, NotebookPage

pytestmark = pytest.mark.browser

SET_UP = """\
from nbpeft.widgets import AdaptersPanel, BlendPanel, ComparePanel
from tests.widgets.answering import AnsweringSession
session = AnsweringSession()
asked = 'Order: Ana from Lima needs 12 chairs.'
"""
PANELS = (
    "AdaptersPanel(session, 'model')",
    "ComparePanel(session, 'model', prompt=asked)",
    "BlendPanel(session, 'model', prompt=asked)",
)


def use(page: NotebookPage) -> None:
    """Clicks in every panel, as a person would."""
    page.run_all()
    page.click("sql", cell=1)
    page.click("Send", cell=2)
    page.wait_for("answered in", cell=2)
    page.click("Answer", cell=3)
    page.wait_for("answered in", cell=3)
    page.page.wait_for_timeout(2000)  # the state follows within a second


def states(page: NotebookPage) -> Locator:
    return page.page.locator(".nbpeft-state").filter(visible=True)


def widgets(page: NotebookPage) -> Locator:
    return page.page.locator(".nbpeft-panel").filter(visible=True)


def shows_the_last_states(page: NotebookPage) -> None:
    """Exactly one picture of each panel, with what was clicked last, and no error."""
    expect(states(page)).to_have_count(3)
    expect(widgets(page)).to_have_count(0)
    for words in WIDGET_ERRORS:
        assert page.page.get_by_text(words).filter(visible=True).count() == 0
    text = page.output_text(1)
    assert "sql" in text and "active" in text.partition("sql")[2]
    assert "SELECT chairs" in page.output_text(2)
    assert "12, arr" in page.output_text(3)


def test_a_live_panel_hides_its_state(open_notebook: Opener) -> None:
    page = open_notebook(SET_UP, *PANELS)
    use(page)
    expect(widgets(page)).to_have_count(3)
    expect(states(page)).to_have_count(0)
    page.save()
    page.reopen()  # the kernel lives on: so do the panels
    expect(widgets(page)).to_have_count(3)
    expect(states(page)).to_have_count(0)
    page.click("pirate", cell=1)
    expect(page.output(1).locator(".nbpeft-row.nbpeft-on")).to_have_count(1)


def test_a_notebook_with_a_new_kernel_shows_the_last_states(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(SET_UP, *PANELS)
    use(page)
    page.page.evaluate("async () => { await window.nb.kernel().restart(); }")
    shows_the_last_states(page)
    page.save()
    page.page.evaluate("async () => { await window.nb.panel().sessionContext.shutdown(); }")
    page.reopen()
    page.page.wait_for_timeout(1000)
    shows_the_last_states(page)
    page.screenshot(pictures / f"panels-reopened-{app}.png")


def test_a_converted_notebook_shows_the_last_states(open_notebook: Opener, tmp_path: Path, app: str) -> None:
    page = open_notebook(SET_UP, *PANELS)
    use(page)
    page.save()
    source, target = page.file, tmp_path / "page.html"
    command = [sys.executable, "-m", "nbconvert", "--to", "html", str(source), "--output", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    shown = page.page.context.new_page()
    try:
        shown.goto(target.as_uri())
        expect(shown.locator(".nbpeft-state").filter(visible=True)).to_have_count(3)
        text = shown.locator("body").inner_text()
        assert "SELECT chairs" in text and "12, arr" in text
        assert "VBox" not in text and "Error displaying" not in text
    finally:
        shown.close()


def test_a_panel_that_is_run_again_elsewhere_leaves_a_line(open_notebook: Opener) -> None:
    page = open_notebook(SET_UP, PANELS[0], PANELS[0])
    page.run_all()
    expect(page.output(1).get_by_text("was opened again in another cell")).to_be_visible()
    expect(page.output(1).locator(".nbpeft-panel").filter(visible=True)).to_have_count(0)
    page.run_cell(1)
    expect(page.output(1).locator(".nbpeft-panel").filter(visible=True)).to_have_count(1)
    expect(page.output(2).locator(".nbpeft-panel").filter(visible=True)).to_have_count(0)
