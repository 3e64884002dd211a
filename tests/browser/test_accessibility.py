"""An automatic audit of cards and panels with axe-core, and what screen readers are told by sliders and toggles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Opener
from tests.browser.harness import NotebookPage

pytestmark = pytest.mark.browser

SET_UP = """\
import dataclasses
from IPython.display import HTML, display
from nbpeft.display.html import to_html
from nbpeft.display.next_steps import next_steps
from nbpeft.display.training import training_card
from nbpeft.widgets import AdaptersPanel, BlendPanel, ComparePanel, PlanPanel
from tests.widgets.answering import AnsweringSession
from tests.widgets.fakes import MEMORY, train_state
from nbpeft.session import Session
from tests.widgets.test_plan_panel import CONFIG
session = AnsweringSession()
adapters = session.models["model"].adapters
session.change("model", adapters=tuple(dataclasses.replace(item, unsaved=True) for item in adapters))
fields = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
planner = Session().memory_planner(CONFIG, fields, batch_size=4, max_length=256, device="20MB", variable="model")
def card(**changes):
    train = train_state(25, 40, memory=MEMORY, message="4 rows held out · the loss is NaN · slow", **changes)
    steps = next_steps(train, session.state, "model")
    display(HTML(to_html(training_card(train, model_name="model", next_steps=steps))))
"""
CELLS = (
    "AdaptersPanel(session, 'model')",
    "ComparePanel(session, 'model', prompt='Order: Ana from Lima needs 12 chairs.')",
    "BlendPanel(session, 'model')",
    "PlanPanel(planner)",
    "card(warnings=('slow',))\ncard(status='finished')\ncard(status='stopped', errors=('the loss is NaN',))\n"
    "card(status='failed')",
)


def audit(page: NotebookPage) -> list[str]:
    """The serious findings in the outputs, one line each."""
    from axe_playwright_python.sync_playwright import Axe

    context = ".jp-OutputArea-output"
    # JupyterLab's body has no height and hides what overflows it: axe takes all of the page's text for hidden.
    page.page.evaluate("() => { document.body.style.overflow = 'visible'; }")
    found: dict[str, Any] = Axe().run(page.page, context, {"resultTypes": ["violations", "passes"]}).response
    passed = {rule["id"]: len(rule["nodes"]) for rule in found["passes"]}
    assert passed["color-contrast"] > 100 and passed["aria-input-field-name"] > 5, "what was looked at"
    return [
        f"{finding['id']}: {node['html'][:160]} {node['failureSummary'][:300]}"
        for finding in found["violations"]
        if finding["impact"] in ("serious", "critical")
        for node in finding["nodes"]
    ]


def test_an_audit_has_no_serious_findings(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(SET_UP, *CELLS)
    page.run_all()
    page.click("Save", cell=1)
    page.click("Send", cell=2)
    page.wait_for("answered in", cell=2)
    page.page.set_viewport_size({"width": 1280, "height": 5000})  # what is scrolled away is not looked at
    for theme in ("light", "dark"):
        page.theme(theme)
        page.screenshot(pictures / f"accessible-{app}-{theme}.png")
        assert audit(page) == []


def test_sliders_and_toggles_say_what_they_are(open_notebook: Opener) -> None:
    page = open_notebook(SET_UP, *CELLS[:4])
    page.run_all()
    toggles = page.output(1).locator(".nbpeft-toggles")
    expect(toggles.get_by_role("button", name="orders", pressed=True)).to_have_count(1)
    expect(toggles.get_by_role("button", name="sql", pressed=False)).to_have_count(1)
    page.button("sql", cell=1).focus()
    page.page.keyboard.press("Enter")
    expect(toggles.get_by_role("button", name="sql", pressed=True)).to_have_count(1)
    expect(toggles.get_by_role("button", name="orders", pressed=False)).to_have_count(1)
    expect(page.output(1).locator(".nbpeft-row.nbpeft-on")).to_contain_text("active")
    batch = page.output(4).get_by_role("slider", name="batch", exact=True)
    expect(batch).to_have_attribute("aria-valuetext", page.output(4).locator(".widget-readout").first.inner_text())
    before = str(batch.get_attribute("aria-valuetext"))
    batch.press("ArrowRight")
    expect(batch).not_to_have_attribute("aria-valuetext", before)
    expect(batch).to_have_attribute("aria-valuetext", page.output(4).locator(".widget-readout").first.inner_text())
    assert page.output(3).get_by_role("slider", name="orders").get_attribute("aria-valuetext") == "1.00"
