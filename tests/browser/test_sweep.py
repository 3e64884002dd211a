"""A person trains three adapters side by side, stops one of them with a click, clones another, and stops all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect

from tests.browser.conftest import Opener
from tests.browser.harness import NotebookPage

pytestmark = pytest.mark.browser

MODEL = """\
%load_ext nbpeft
import nbpeft
import torch
from tests.tiny_models import llama

torch.set_num_threads(1)
model = llama()
rows = [{"input_ids": [1 + (step * start) % 7 for step in range(12)]} for start in range(64)]
%lora add model --name codes r=4 target_modules=q_proj,v_proj
"""
TRAIN = """\
%%lora_train model --data rows --eval-data 8
max_steps = 20000
per_device_train_batch_size = 2
eval_steps = 20
learning_rate = sweep(1e-4, 1e-3, 1e-2)
"""


AFTER = """\
{member.name: (member.status, member.step < 20000) for member in nbpeft.get_session().last_result.state.members}
"""


def row(page: NotebookPage, name: str) -> Locator:
    """The row of an adapter, with its buttons."""
    return page.output(1).locator(".nbpeft-member").filter(has_text=re.compile(rf"{name}(?!-lr)"))


@pytest.mark.parametrize("app", ["lab"], indirect=True)
def test_one_is_stopped_another_cloned_and_all_stopped(open_notebook: Opener, pictures: Path) -> None:
    page = open_notebook(MODEL, TRAIN, AFTER)
    page.run_cell(0)
    page.start_cell(1)
    page.wait_for(re.compile(r"^[1-9]\d[\d,]* / 20,000$"), cell=1, timeout=90)
    row(page, "codes-lr1e-4").get_by_role("button", name="Stop").click()
    page.wait_for(re.compile(r"stopped at step \d+"), cell=1, timeout=60)
    expect(row(page, "codes-lr1e-4").get_by_role("button", name="Stop")).to_be_disabled()
    page.wait_for("running", cell=1)
    row(page, "codes-lr1e-2").get_by_role("button", name="Clone").click()
    page.wait_for(re.compile(r"codes-lr1e-2-lr5e-3"), cell=1)
    expect(row(page, "codes-lr1e-2-lr5e-3").get_by_role("button", name="Stop")).to_be_enabled(timeout=30_000)
    for width in (1280, 600):
        page.page.set_viewport_size({"width": width, "height": 900})
        if width == 600:  # what is left beside the file browser is 210 pixels wide
            page.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
        for theme in ("light", "dark"):
            page.theme(theme)
            page.screenshot(pictures / f"sweep-running-{width}-{theme}.png")
    page.theme("light")
    page.click("Stop", cell=1)
    page.wait_idle()
    expect(page.button("Stop", cell=1)).to_have_count(0)
    expect(page.output(1).locator("img[src^='data:image/svg+xml']").first).to_be_visible()
    page.screenshot(pictures / "sweep-stopped.png")
    page.check()
    page.run_cell(2)
    assert "'codes-lr1e-2-lr5e-3': ('stopped', True)" in page.output_text(2)
