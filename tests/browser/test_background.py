"""A person trains in the background, asks the model meanwhile, and stops the training with a click."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Opener

pytestmark = pytest.mark.browser

MODEL = """\
%load_ext nbpeft
import time
import nbpeft
import torch
from tests.char_tokenizer import CharTokenizer
from tests.tiny_models import llama, randomize

torch.set_num_threads(1)
model, tokenizer = llama(), CharTokenizer("yes")
rows = [{"input_ids": [1 + (step + start) % 7 for step in range(12)]} for start in range(64)]
%lora add model --name sql r=4 target_modules=q_proj,v_proj lora_dropout=0.2
"""
TRAIN = """\
%%lora_train model --data rows --background
max_steps = 20000
per_device_train_batch_size = 2
learning_rate = 1e-3
logging_steps = 1
"""
ASK = '%lora ask "Ana needs 12 chairs" --max-new-tokens 24'
MEANWHILE = """\
def step():
    return nbpeft.get_session().state.model("model").training.step

before = step()
made = model.generate(input_ids=torch.arange(9)[None], max_new_tokens=4, min_new_tokens=4)
for _ in range(300):
    if step() > before:
        break
    time.sleep(0.1)
print("stepped", step() > before, "and made", made.shape[1], "tokens")
"""
DISTURB = """\
try:
    nbpeft.get_session().use("sql")
except nbpeft.errors.BusyError as error:
    print(error)
"""
WAIT = """\
print("waiting")
print(Out[2].wait(60).status, nbpeft.get_session().result("model").status)
"""


def test_asking_and_stopping_while_it_trains(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(MODEL, TRAIN, ASK, MEANWHILE, DISTURB, WAIT)
    for cell in range(3):
        page.run_cell(cell)
    assert "tokens/s" in page.output_text(2)
    page.wait_for(re.compile(r"^[1-9][\d,]* / 20,000$"), cell=1, timeout=60)
    page.run_cell(3)
    assert "stepped True and made 13 tokens" in page.output_text(3)
    page.run_cell(4)
    assert "busy: training sql" in page.output_text(4)
    page.run_cell(1)
    assert "busy: training sql" in page.output_text(1)  # below the live card, whose buttons are used from here on
    page.interrupt()
    page.click("Pause", cell=1)
    page.wait_for(re.compile("paused"), cell=1)
    page.run_cell(2)
    page.click("Resume", cell=1)
    page.wait_for(re.compile("running"), cell=1)
    for theme in ("light", "dark") if app == "lab" else ("light",):
        page.theme(theme)
        for width in (1280, 800, 600):
            page.page.set_viewport_size({"width": width, "height": 1000})
            page.screenshot(pictures / f"background-{app}-{width}-{theme}.png")
    page.start_cell(5)  # a cell that runs: the click has to get past it
    page.wait_for("waiting", cell=5)
    page.click("Stop", cell=1)
    page.wait_for("stopped stopped", cell=5, timeout=60)
    page.wait_idle()
    expect(page.button("Stop", cell=1)).to_have_count(0)
    expect(page.output(1).locator("img[src^='data:image/svg+xml']").first).to_be_visible()
    page.check()
