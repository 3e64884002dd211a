"""Cells of a real notebook in a real browser: magics, session, training and panels on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Opener

pytestmark = pytest.mark.browser

MODEL = """\
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)
rows = [{"input_ids": torch.randint(0, 64, (16,)).tolist()} for _ in range(64)]
%load_ext nbpeft
"""
ADAPT = """\
%%lora model --name {name}
r = 4
target_modules = ["q_proj", "v_proj"]
init_lora_weights = False
"""
PANEL = "%lora panel"
ANSWER = """\
with torch.no_grad():
    print("answer", round(float(model(torch.arange(12)[None]).logits.std()), 6))
"""
TRAIN = """\
%%lora_train model --data rows
max_steps = 5000
per_device_train_batch_size = 2
learning_rate = 1e-3
logging_steps = 1
"""
LOOP = """\
from nbpeft import track

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
batch = torch.tensor([row["input_ids"] for row in rows])
with track(model, total_steps=5000) as run:
    for step in range(5000):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(loss, tokens=batch.numel())
print("status", run.state.status)
"""


def answer(page, cell: int) -> str:
    page.run_cell(cell)
    found = re.search(r"answer (\S+)", page.output_text(cell))
    assert found
    return found[1]


def test_the_panel_switches_adapters_of_a_model(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(MODEL, ADAPT.format(name="orders"), ADAPT.format(name="sql"), PANEL, ANSWER)
    page.run_all()
    sql = answer(page, 4)
    page.click("orders", cell=3)
    active = page.output(3).locator(".nbpeft-row.nbpeft-on")
    expect(active).to_have_text([re.compile("orders")])  # for a moment two rows are, or none
    orders = answer(page, 4)
    page.click("base", cell=3)
    expect(active).to_have_count(0)
    base = answer(page, 4)
    assert len({sql, orders, base}) == 3
    page.click("sql", cell=3)
    expect(active).to_have_text([re.compile("sql")])
    assert answer(page, 4) == sql
    page.wait_for(re.compile("base weights [0-9.]+ "), cell=3)
    page.screenshot(pictures / f"session-panel-{app}.png")


@pytest.mark.parametrize("training", [TRAIN, LOOP], ids=["trainer", "loop"])
def test_training_is_paused_resumed_and_stopped(open_notebook: Opener, pictures: Path, app: str, training: str) -> None:
    page = open_notebook(MODEL, ADAPT.format(name="orders"), training, PANEL, ANSWER)
    page.run_cell(0)
    page.run_cell(1)
    page.start_cell(2)
    page.wait_for(re.compile(r"^[1-9][\d,]* / 5,000$"), cell=2, timeout=60)
    page.click("Pause", cell=2)
    page.wait_for("paused · model", cell=2, timeout=10)
    page.click("Resume", cell=2)
    page.wait_for("running · model", cell=2, timeout=10)
    page.screenshot(pictures / f"session-train-{app}.png")
    page.click("Stop", cell=2)
    page.wait_for("stopped · model", cell=2, timeout=10)
    page.wait_idle()
    page.check()
    expect(page.output(2).locator("img[src^='data:image/svg+xml']")).to_be_visible()
    expect(page.button("Stop", cell=2)).to_have_count(0)
    page.run_cell(3)
    page.run_cell(4)
    assert "orders" in page.output_text(3)
    page.screenshot(pictures / f"session-stopped-{app}.png")
