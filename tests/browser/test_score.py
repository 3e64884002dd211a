"""What ``%lora score`` shows, in a real browser: in the width there is, without a kernel, and not trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect

from tests.browser.conftest import Opener
from tests.scoring.samples import orders

pytestmark = pytest.mark.browser

SETUP = """\
%load_ext nbpeft
from tests.char_tokenizer import CharTokenizer
from tests.scoring.support import ROWS, adapted
model, tokenizer, rows = adapted(), CharTokenizer(), ROWS * 3
%lora use sql"""


def overflow(card: Locator) -> int:
    """Pixels by which something of a card is wider than it."""
    return int(card.evaluate("card => card.scrollWidth - card.clientWidth"))


def test_scores_are_shown_and_stay_without_a_kernel(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(
        SETUP,
        "%lora score --data rows --metric f1 loss --max-new-tokens 8 --batch-size 4",
        "from tests.scoring.samples import orders\norders()",
    )
    page.run_all()
    page.wait_for("95 % bootstrap intervals", cell=1)
    assert "so far" not in page.output_text(1)
    expect(page.button("Next", cell=1)).to_be_visible()
    page.save()
    page.page.evaluate("async () => { await window.nb.kernel().restart(); }")
    page.reopen()
    page.output(1).get_by_text("all items: 36").filter(visible=True).first.click()
    expect(page.output(1).get_by_text("and 31 more, in the result's items").first).to_be_visible()
    expect(page.button("Next", cell=1).filter(visible=True)).to_have_count(0)
    output = page.output(2)
    card = output.locator("div", has_text="Scores of model").first
    summary = output.get_by_text("fixed by orders: 18")
    for theme in ("light", "dark") if app == "lab" else ("light",):
        if theme == "dark":
            page.theme("dark")
        for width in (1280, 600):
            page.page.set_viewport_size({"width": width, "height": 1000})
            expect(output.locator("img[alt*='base 31.2 %']")).to_be_visible()
            expect(output.get_by_text("fixed 18, broke 3 (p = 0.0015)")).to_be_visible()
            expect(output.get_by_text("48 items cannot tell these two apart")).to_be_visible()
            assert overflow(card) <= 0
            page.screenshot(pictures / f"score-{app}-{theme}-{width}.png")
            summary.click()
            expect(output.get_by_text("Order: Ana from Lima needs 7 chairs.").first).to_be_visible()
            assert overflow(card) <= 0
            page.screenshot(pictures / f"score-{app}-{theme}-{width}-items.png")
            summary.click()
    summary.click()
    output.get_by_text("broken by orders: 3").click()
    expect(output.locator("details[open]")).to_have_count(1)  # one filter at a time
    expect(output.locator("details[open]").get_by_text("wrong").first).to_be_visible()
    page.check()


def test_one_pages_through_the_items(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(
        "%load_ext nbpeft\nfrom nbpeft.widgets import ScorePanel\nfrom tests.scoring.samples import orders",
        "ScorePanel(orders())",
    )
    page.run_all()
    output = page.output(1)
    for theme in ("light", "dark") if app == "lab" else ("light",):
        if theme == "dark":
            page.theme("dark")
        for width in (1280, 600):
            page.page.set_viewport_size({"width": width, "height": 1000})
            page.click("fixed by orders: 18", cell=1)
            expect(output.get_by_text("1–5 of 18")).to_be_visible()
            page.click("Next", cell=1)
            expect(output.get_by_text("6–10 of 18")).to_be_visible()
            expect(page.button("Previous", cell=1)).to_be_enabled()
            output.get_by_label("page").fill("4")
            output.get_by_label("page").press("Enter")
            expect(output.get_by_text("16–18 of 18")).to_be_visible()
            output.get_by_label("Search").fill("lamps oslo")
            expect(output.get_by_text("1–2 of 2")).to_be_visible()
            assert overflow(output.locator(".nbpeft-panel")) <= 0
            page.screenshot(pictures / f"score-panel-{app}-{theme}-{width}.png")
            output.get_by_label("Search").fill("")
            expect(output.get_by_text("1–5 of 18")).to_be_visible()
    page.check()


def test_labels_are_counted_by_answer(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(
        "%load_ext nbpeft\nfrom nbpeft.widgets import ScorePanel\nfrom tests.scoring.samples import tickets",
        "ScorePanel(tickets())",
    )
    page.run_all()
    output = page.output(1)
    output.get_by_text("answers of tickets by reference").filter(visible=True).click()
    expect(output.get_by_role("columnheader", name="another answer").filter(visible=True)).to_have_count(1)
    for width in (1280, 600):
        page.page.set_viewport_size({"width": width, "height": 1000})
        page.screenshot(pictures / f"score-confusion-{app}-{width}.png")
        assert overflow(output.locator(".nbpeft-panel")) <= 0
    page.check()


def test_a_stop_keeps_what_is_scored(open_notebook: Opener, app: str) -> None:
    setup = f"{SETUP}\nimport time\nslow = lambda answer, row: not time.sleep(0.02)\nrows = rows * 40"
    page = open_notebook(setup, "%lora score --data rows --metric slow --max-new-tokens 4 --batch-size 2")
    page.run_cell(0)
    page.start_cell(1)
    page.wait_for("so far: base", cell=1)
    page.click("Stop", cell=1)
    page.wait_for("stopped after", cell=1)
    page.wait_idle()
    assert "of 1,440 items" in page.output_text(1)
    expect(page.button("Stop", cell=1)).to_have_count(0)
    page.check()


def test_a_notebook_that_is_not_trusted_shows_them_too(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(shown=[{"text/html": orders()._repr_html_(), "text/plain": "hidden"}])
    page.wait_for("fixed 18, broke 3", cell=0)
    expect(page.output(0).locator("img[alt*='base 31.2 %']")).to_be_visible()
    page.output(0).get_by_text("broken by orders: 3").click()
    expect(page.output(0).get_by_text("needs 13 chairs").first).to_be_hidden()
    page.screenshot(pictures / f"score-{app}-untrusted.png")
