"""Cards and panels with the colours and the policy of VS Code's notebooks are readable, in a light and a dark theme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from nbpeft.display.html import to_html
from nbpeft.display.next_steps import next_steps
from nbpeft.display.training import training_card
from tests.browser.conftest import Opener
from tests.browser.harness import Browser
from tests.browser.test_accessibility import CELLS, SET_UP
from tests.browser.vscode import Theme, block_others, repaint, show_html
from tests.display import samples
from tests.widgets.fakes import MEMORY, FakeSession, train_state

pytestmark = pytest.mark.browser
THEMES: tuple[Theme, ...] = ("light", "dark")


def unreadable(page: Page, outputs: str, least: int) -> list[str]:
    """Texts whose contrast with what is behind them is too low, one line each.

    Args:
        page: the page.
        outputs: what to look at.
        least: how many texts there are at least.
    """
    from axe_playwright_python.sync_playwright import Axe

    options = {"runOnly": ["color-contrast"], "resultTypes": ["violations", "passes"]}
    found: dict[str, Any] = Axe().run(page, outputs, options).response
    passed = sum(len(rule["nodes"]) for rule in found["passes"])
    low = [node for rule in found["violations"] for node in rule["nodes"]]
    assert passed + len(low) >= least, f"{passed} texts are readable: what was looked at?"
    return [f"{node['html'][:160]} {node['failureSummary'][:300]}" for node in low]


def cards() -> list[str]:
    """The HTML of every result, and of trainings that run, end and fail."""
    session = FakeSession()
    results = [result.view() for result in samples.results().values()]
    html = [to_html(block) for block in (*results, *samples.states().values())]
    for status in ("running", "finished", "failed"):
        train = train_state(25, 40, memory=MEMORY, message="slow", status=status, warnings=("hot",))
        steps = next_steps(train, session.state, "model")
        html.append(to_html(training_card(train, model_name="model", next_steps=steps)))
    return html


@pytest.mark.parametrize("theme", THEMES)
def test_cards_without_widgets(browser: Browser, pictures: Path, theme: Theme) -> None:
    page, console = show_html(browser, cards(), theme)
    try:
        page.screenshot(path=pictures / f"vscode-cards-{theme}.png", full_page=True)
        assert unreadable(page, ".output", 150) == []
        assert console == []
    finally:
        page.close()


@pytest.mark.parametrize("app", ["lab"], indirect=True)
def test_panels_and_cards_beside_widgets(open_notebook: Opener, pictures: Path) -> None:
    page = open_notebook(SET_UP, *CELLS)
    page.theme("light")
    asked = block_others(page.page)
    page.run_all()
    page.click("Save", cell=1)
    page.click("Send", cell=2)
    page.wait_for("answered in", cell=2)
    page.page.set_viewport_size({"width": 1280, "height": 5000})
    page.page.evaluate("() => { document.body.style.overflow = 'visible'; }")
    for theme in THEMES:
        repaint(page, theme)
        page.screenshot(pictures / f"vscode-panels-{theme}.png")
        assert unreadable(page.page, ".jp-OutputArea-output", 100) == []
    assert asked == [], "nothing comes from another machine"
