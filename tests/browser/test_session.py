"""Cells of a real notebook in a real browser: magics, session, training and panels on a tiny model."""

from __future__ import annotations

import re
import time
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
from nbpeft import start_run

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
batch = torch.tensor([row["input_ids"] for row in rows])
with start_run(model, total_steps=5000) as run:
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
    page.wait_for(re.compile("^paused$"), cell=2, timeout=30)
    page.click("Resume", cell=2)
    page.wait_for(re.compile("^running$"), cell=2, timeout=30)
    page.screenshot(pictures / f"session-train-{app}.png")
    page.click("Stop", cell=2)
    page.wait_for(re.compile("^stopped$"), cell=2, timeout=30)
    page.wait_idle()
    page.check()
    expect(page.output(2).locator("img[src^='data:image/svg+xml']").first).to_be_visible()
    expect(page.button("Stop", cell=2)).to_have_count(0)
    page.run_cell(3)
    page.run_cell(4)
    assert "orders" in page.output_text(3)
    page.screenshot(pictures / f"session-stopped-{app}.png")


STEP = """\
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
batch = torch.tensor([row["input_ids"] for row in rows])
model(input_ids=batch, labels=batch).loss.backward()
optimizer.step()
optimizer.zero_grad()
"""
NAMES = "print('adapters', model.manager.names, 'unsaved', sorted(model.manager.unsaved))"


def test_what_was_trained_is_marked_and_comes_back_by_a_click(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(MODEL, ADAPT.format(name="orders"), ADAPT.format(name="sql"), PANEL, STEP, ANSWER, NAMES)
    for cell in range(4):
        page.run_cell(cell)
    row = page.output(3).locator(".nbpeft-row").filter(has_text="sql")
    expect(row).not_to_contain_text("not saved")
    page.run_cell(4)  # a loop of one's own, which nothing was told of
    expect(row).to_contain_text("not saved")
    trained = answer(page, 5)
    page.screenshot(pictures / f"session-not-saved-{app}.png")
    row.get_by_role("button", name="Delete", exact=True).click()
    row.locator(".nbpeft-danger").click()
    page.wait_for("deleted 'sql'", cell=3)
    page.run_cell(6)
    assert "adapters ('orders',) unsaved []" in page.output_text(6)
    assert answer(page, 5) != trained
    page.screenshot(pictures / f"session-deleted-{app}.png")
    page.click("Undo", cell=3)
    page.wait_for("'sql' is back", cell=3)
    expect(page.button("Undo", cell=3)).to_be_hidden()
    expect(row).to_contain_text("not saved")
    page.run_cell(6)
    assert "adapters ('orders', 'sql') unsaved ['sql']" in page.output_text(6)
    assert answer(page, 5) == trained, "the same weights, bit for bit, and active again"
    page.screenshot(pictures / f"session-undone-{app}.png")
    row.get_by_role("button", name="Save", exact=True).click()
    row.locator(".nbpeft-primary").click()
    expect(row).not_to_contain_text("not saved")
    page.run_cell(6)
    assert "unsaved []" in page.output_text(6)


SLOW = """\
import time
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(15 if state.global_step else 0)

slow = [Slow()]
"""
SLOW_TRAIN = f"{TRAIN}callbacks = slow\n"
QUEUED = "print('QUEUED CELL RAN')"
LAST = """\
result = nbpeft.get_session().last_result
print("last", result.status, result.steps, result.state.status)
"""


def test_an_interruption_stops_queued_cells_and_stop_does_not(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(f"{MODEL}import nbpeft", ADAPT.format(name="orders"), TRAIN, QUEUED, LAST)
    page.start_all()
    page.wait_for(re.compile(r"^[1-9][\d,]* / 5,000$"), cell=2, timeout=90)
    page.interrupt()
    page.wait_for(re.compile("progress is kept"), cell=2, timeout=40)
    page.wait_idle()
    assert "QUEUED CELL RAN" not in page.output_text(3)
    assert "Traceback" not in page.output_text(2)
    expect(page.button("Stop", cell=2)).to_have_count(0)
    page.screenshot(pictures / f"session-interrupted-{app}.png")
    page.start_cell(4)
    page.wait_idle()
    interrupted = re.search(r"last stopped (\d+) stopped", page.output_text(4))
    assert interrupted and int(interrupted[1]) > 0
    page.start_all()
    page.wait_for(re.compile(r"^[1-9][\d,]* / 5,000$"), cell=2, timeout=90)
    page.click("Stop", cell=2)
    page.wait_idle()
    page.check()
    assert "QUEUED CELL RAN" in page.output_text(3)
    assert re.search(r"last stopped \d+ stopped", page.output_text(4))


def test_clicks_show_while_a_step_takes_fifteen_seconds(
    open_notebook: Opener, pictures: Path, app: str, notebook_folder: Path
) -> None:
    page = open_notebook(f"{MODEL}import nbpeft\n{SLOW}", ADAPT.format(name="orders"), SLOW_TRAIN, LAST)
    for cell in (0, 1):
        page.run_cell(cell)
    page.start_cell(2)
    page.wait_for(re.compile(r"^1 / 5,000$"), cell=2, timeout=60)
    for label, shown, answer in (
        ("Pause", "pausing after this step", "Pausing…"),
        ("Save now", re.compile("saving after this step"), "Saving…"),
        ("Stop", "stopping after this step", "Stopping…"),
    ):
        began = time.monotonic()
        page.click(label, cell=2)
        page.wait_for(shown, cell=2, timeout=3)
        print(f"{app}: {label} was shown after {time.monotonic() - began:.2f} s")
        expect(page.button(answer, cell=2)).to_be_visible(timeout=1000)
    page.screenshot(pictures / f"session-slow-{app}.png")
    assert "1 / 5,000" in page.output_text(2)  # still inside the step
    page.wait_for(re.compile("^stopped$"), cell=2, timeout=40)
    page.wait_idle()
    page.check()
    page.wait_for(re.compile(r"saved in \S*orders-step-\d"), cell=2)
    folder = re.search(r"saved in (\S*orders-step-\d+)", page.output_text(2))
    assert folder and (notebook_folder / folder[1] / "adapter_model.safetensors").is_file()
    page.run_cell(3)
    assert re.search(r"last stopped [1-4] stopped", page.output_text(3))


WHOLE = """\
%%lora_train model --data rows --eval-data held_out --tokenizer tok --sample "Oslo needs 31" --every 20 --patience 50
max_steps = 80
per_device_train_batch_size = 4
learning_rate = 5e-2
eval_steps = 10
compute_metrics = accuracy
"""
HELP = """\
from tests.char_tokenizer import CharTokenizer

tok = CharTokenizer()
held_out = rows[:8]

def accuracy(predictions):
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}
"""


def test_the_card_of_a_whole_run(open_notebook: Opener, pictures: Path, app: str) -> None:
    model = MODEL.replace("vocab_size=64", "vocab_size=100")
    page = open_notebook(f"{model}{HELP}", ADAPT.format(name="orders"), WHOLE)
    page.run_all()
    text = page.output_text(2)
    for words in ("accuracy", "gradient norm", "learning rate", "tokens/s", "memory", "earlier answers", "finished"):
        assert words in text, words
    strip = page.output(2).locator("div[data-at^='step 40']").first
    expect(strip).to_have_attribute(
        "data-at", re.compile(r"^step 40\s+loss [\d.]+\s+smoothed [\d.]+\s+eval loss [\d.]+")
    )
    for theme in ("light", "dark"):
        page.theme(theme)
        for width in (1280, 800, 600):
            page.page.set_viewport_size({"width": width, "height": 900})
            card = page.output(2).locator("div").first
            assert card.evaluate("card => card.scrollWidth <= card.clientWidth + 1")
            page.screenshot(pictures / f"card-{app}-{theme}-{width}.png")
    page.theme("light")
    page.page.set_viewport_size({"width": 1280, "height": 1000})
    assert "widget-view" not in str(page.save())
    page.reopen()
    page.wait_for(re.compile("earlier answers"), cell=2)
