"""The plan panel in a real browser: sliders answer, switches come when they are computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Opener

pytestmark = pytest.mark.browser

CONFIG = """\
from transformers import LlamaConfig

config = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16", architectures=["LlamaForCausalLM"],
)
%load_ext nbpeft
"""
PLAN = "%lora plan config --batch-size 4 --max-length 1024 --device 16GB"


def test_sliders_say_whether_it_fits(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(CONFIG, PLAN, f"{PLAN} bits=4 gradient_checkpointing=True --panel")
    page.run_all()
    page.wait_for(re.compile("does not fit 16.0 GB"), cell=1)
    panel = page.output(2)
    expect(panel.get_by_text(re.compile("^fits 16.0 GB")).filter(visible=True)).to_be_visible(timeout=90000)
    page.screenshot(pictures / f"plan-{app}.png")
    track = panel.locator(".noUi-target").nth(1)
    size = track.bounding_box()
    assert size is not None
    track.click(position={"x": 0.8 * size["width"], "y": size["height"] / 2})
    expect(panel.get_by_text(re.compile("^does not fit 16.0 GB")).filter(visible=True)).to_be_visible(timeout=90000)
    expect(panel.get_by_text("no room for").filter(visible=True)).to_be_visible(timeout=90000)
    panel.get_by_label("optimizer").select_option("sgd")
    expect(panel.get_by_text("optimizer 0 B").filter(visible=True)).to_have_count(0)
    panel.locator("input[type=checkbox]").click()
    expect(panel.get_by_text("gradient_checkpointing=True").filter(visible=True).first).to_be_visible(timeout=90000)
    page.theme("dark") if app == "lab" else None
    page.screenshot(pictures / f"plan-moved-{app}.png")
    page.check()
