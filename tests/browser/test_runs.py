"""A person sorts the saved runs by a click, selects two and compares them; tables are readable at 600 pixels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Opener

pytestmark = pytest.mark.browser

MODEL = """\
%load_ext nbpeft
import torch
from tests.tiny_models import llama

torch.set_num_threads(1)
model = llama()
rows = [{"input_ids": [1 + (step * start) % 7 for step in range(12)]} for start in range(40)]
%lora add model --name support_tickets_to_team r=4 target_modules=all-linear
"""
TRAIN = """\
%%lora_train model --data rows --eval-data {held} --restart
max_steps = {steps}
eval_steps = 2
eval_strategy = "steps"
per_device_train_batch_size = 4
learning_rate = {rate}
"""
IN_SIGHT = """part => {
  const frame = part.closest(".nbpeft-runs").getBoundingClientRect();
  return part.getBoundingClientRect().right <= frame.right + 1;
}"""
INSIDE = "parts => parts.every(part => part.scrollWidth <= part.clientWidth + 1)"


@pytest.mark.parametrize("app", ["lab"], indirect=True)
def test_runs_are_sorted_and_compared(open_notebook: Opener, pictures: Path) -> None:
    cells = [TRAIN.format(held=held, steps=steps, rate=rate) for held, steps, rate in ((8, 6, 1e-2), (4, 12, 1e-3))]
    compare = "%lora runs support_tickets_to_team-1 support_tickets_to_team-2"
    page = open_notebook(MODEL, *cells, "%lora runs", compare, "%lora methods model", "%lora inspect")
    page.run_all()
    page.check()
    panel = page.output(3).locator(".nbpeft-panel")
    names = panel.locator(".nbpeft-row b, .nbpeft-row strong")
    expect(names).to_have_text([re.compile("-2$"), re.compile("-1$")])
    page.click("Steps", cell=3)
    expect(names).to_have_text([re.compile("-2$"), re.compile("-1$")])
    page.click("Run", cell=3)
    expect(names).to_have_text([re.compile("-1$"), re.compile("-2$")])
    for name in ("support_tickets_to_team-1", "support_tickets_to_team-2"):
        panel.get_by_label(f"Select {name}").check()
    expect(panel.get_by_text("2 runs")).to_have_count(2)
    expect(panel.locator("table")).to_contain_text("0.01")
    for width in (1280, 1000, 600):
        page.page.set_viewport_size({"width": width, "height": 900})
        if width == 600:  # what is left beside the file browser is 210 pixels wide
            page.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
        figures = page.page.locator(".jp-OutputArea td[style*='nowrap'], .nbpeft-runs .nbpeft-number").filter(
            visible=True
        )
        assert figures.count() > 20 and figures.evaluate_all(INSIDE)
        losses = panel.locator(".nbpeft-row").get_by_text("loss ").first
        assert losses.evaluate(IN_SIGHT), width  # the results stand first
        cards = page.page.locator(".jp-OutputArea div[style*='border-radius:6px']").filter(visible=True)
        assert cards.evaluate_all(INSIDE)  # what is too wide scrolls inside its card
        for theme in ("light", "dark"):
            page.theme(theme)
            page.screenshot(pictures / f"runs-{width}-{theme}.png")
    page.theme("light")
    page.page.set_viewport_size({"width": 1280, "height": 900})
    panel.get_by_label("Select support_tickets_to_team-2").uncheck()
    panel.get_by_label("Note").fill("the high rate")
    page.click("Save note", cell=3)
    expect(panel.locator(".nbpeft-row").first).to_contain_text("the high rate")
    page.screenshot(pictures / "runs-note.png")
    panel.get_by_label("Search").fill("HIGH rate")
    expect(panel).to_contain_text("1 of 2 runs")
    expect(names).to_have_text([re.compile("-1$")])
    page.click("Delete", cell=3)
    expect(panel).to_contain_text("Delete support_tickets_to_team-1 with all checkpoints?")
    page.screenshot(pictures / "runs-delete.png")
    panel.get_by_role("button", name="Delete").last.click()
    expect(panel).to_contain_text("0 of 1 run")
    panel.get_by_label("Search").fill("")
    expect(names).to_have_text([re.compile("-2$")])
    page.screenshot(pictures / "runs-deleted.png")
