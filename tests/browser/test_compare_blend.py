"""Compare and blend in a real browser: with a tiny model behind them, and with answers worth a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Opener

pytestmark = pytest.mark.browser

MODEL = """\
%load_ext nbpeft
import torch
from tests.tiny_models import randomize
from tests.char_tokenizer import CharTokenizer
from tests.tiny_models import llama
model, tokenizer = llama(), CharTokenizer()
%lora add model --name pirate r=4 target_modules=q_proj,v_proj
%lora add model --name orders r=2 target_modules=q_proj,up_proj
randomize(model, 'pirate', 1)
randomize(model, 'orders', 2)
"""
STATE = "print('adapters:', *(item.name for item in nbpeft.get_session().state.models[0].adapters))"
BOOK = """\
from nbpeft.widgets import BlendPanel, ComparePanel
from tests.widgets.answering import ANSWERS, BLENDED, AnsweringSession
ANSWERS['strict'] = BLENDED
session = AnsweringSession(pause=0.05)
session.combine({'orders': 1}, name='strict', type='exact', seed=0, model='model')
asked = 'Order: Ana from Lima needs 12 chairs.'
"""


def test_compare_and_blend_from_the_adapters_panel(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(
        MODEL, "%lora panel", '%lora compare "Ana needs chairs" --max-new-tokens 12', f"import nbpeft\n{STATE}"
    )
    page.run_all()
    assert "answered in" in page.output_text(2)
    panel = page.output(1)

    page.click("Compare answers", cell=1)
    panel.get_by_label("Prompt", exact=True).fill("Ana needs 12 chairs")
    panel.get_by_label("max new tokens").fill("20")
    panel.get_by_label("max new tokens").press("Tab")
    page.click("Send", cell=1)
    page.wait_for("answered in", cell=1)
    expect(page.button("Stop", cell=1)).to_be_hidden()
    page.screenshot(pictures / f"compare-real-{app}.png")

    page.click("Blend adapters", cell=1)
    expect(page.button("Answer", cell=1)).to_be_visible()
    expect(panel.get_by_label("Prompt", exact=True)).to_have_value("Ana needs 12 chairs")
    weight = panel.locator(".widget-readout").first
    weight.fill("0.3")
    weight.press("Enter")
    page.wait_for("pirate + orders (0.3 / 1)", cell=1)
    page.wait_for("answered in", cell=1)
    page.click("Save as adapter", cell=1)
    page.wait_for("nothing lost", cell=1)
    page.screenshot(pictures / f"blend-real-{app}.png")
    page.run_cell(3)
    assert "adapters: pirate orders blend" in page.output_text(3)
    expect(panel.locator(".nbpeft-row").filter(has_text="blend")).to_have_count(1)
    saved = page.save()
    comparison = str(saved["cells"][2]["outputs"])
    assert "widget-view" not in comparison and "Ana needs chairs" in comparison
    page.check()


def test_words_that_differ_are_marked(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(
        BOOK,
        "ComparePanel(session, 'model', prompt=asked)",
        "BlendPanel(session, 'model', prompt=asked)",
        "session.error = RuntimeError('no room <b>left</b>')",
    )
    for cell in range(3):
        page.run_cell(cell)
    page.click("sql", cell=1)
    page.click("Send", cell=1)
    page.wait_for("answering …", cell=1)
    expect(page.button("Stop", cell=1)).to_be_visible()
    page.wait_for("answered in", cell=1)
    page.output(1).get_by_label("diff against").select_option("orders")
    page.wait_for('"12, arr"', cell=1)
    page.click("Answer", cell=2)
    page.wait_for("answered in", cell=2)
    for theme in ("light", "dark"):
        page.theme(theme)
        page.screenshot(pictures / f"compare-blend-{app}-{theme}.png")
    page.theme("light")
    page.run_cell(3)
    page.click("Send", cell=1)
    page.wait_for("RuntimeError: no room <b>left</b>", cell=1)
    page.click("✕", cell=1)
    expect(page.output(1).get_by_text("RuntimeError")).to_have_count(0)


CHATTING = """\
from tests.widgets.answering import AnsweringSession
from nbpeft.widgets import ComparePanel
talk = AnsweringSession(pause=0.02, conversing=True)
panel = ComparePanel(talk, 'model', prompt='Order: Ana from Lima needs 12 chairs.')
panel
"""
SAID = """\
for column in panel.result.columns[:2]:
    print(column.title, 'said', [prompt for prompt, _ in column.turns], 'then', panel.result.prompts)
print('settings', talk.sampling)
"""
LIVE = """\
tokenizer = CharTokenizer('yes')
import nbpeft
from nbpeft.widgets import ComparePanel
live = ComparePanel(nbpeft.get_session(), 'model', tokenizer=tokenizer, max_new_tokens=12)
live
"""
TURNS = """\
again = nbpeft.get_session().compare('Hi', max_new_tokens=12, tokenizer=tokenizer)
again = nbpeft.get_session().compare('Why', max_new_tokens=12, after=again)
print('same as asked by hand', again.answers == live.result.answers, 'turns', len(live.result.columns[0].turns))
"""


def test_a_conversation_goes_on_in_every_column(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(CHATTING, SAID, MODEL, LIVE, TURNS)
    page.run_cell(0)
    panel = page.output(0)
    page.click("Send", cell=0)
    page.wait_for("answered in", cell=0)
    expect(panel.get_by_label("Prompt", exact=True)).to_have_value("")
    panel.get_by_label("Prompt", exact=True).fill("And 3 sofas?")
    panel.get_by_label("temperature").or_(panel.locator("input[type=number]").nth(1)).first.fill("0.7")
    panel.locator("input[type=number]").nth(1).press("Tab")
    page.click("Send", cell=0)
    page.wait_for("And 3 sofas?", cell=0)
    page.wait_for("answered in", cell=0)
    page.run_cell(1)
    assert "base said ['Order: Ana from Lima needs 12 chairs.'] then ('And 3 sofas?',)" in page.output_text(1)
    assert "'temperature': 0.7" in page.output_text(1)
    for theme in ("light", "dark") if app == "lab" else ("light",):
        page.theme(theme) if app == "lab" else None
        for width in (1280, 800, 600):
            page.page.set_viewport_size({"width": width, "height": 1000})
            page.screenshot(pictures / f"conversation-{app}-{width}-{theme}.png")
    page.page.set_viewport_size({"width": 1280, "height": 1000})
    page.click("New conversation", cell=0)
    expect(panel.get_by_text("sofas")).to_have_count(0)
    page.run_cell(2)
    page.run_cell(3)
    for prompt in ("Hi", "Why"):
        page.output(3).get_by_label("Prompt", exact=True).fill(prompt)
        page.click("Send", cell=3)
        page.wait_for(prompt, cell=3)
        page.wait_for("answered in", cell=3)
        expect(page.output(3).get_by_label("Prompt", exact=True)).to_have_value("")
    page.run_cell(4)
    assert "same as asked by hand True turns 1" in page.output_text(4)


TRAINED = """\
tokenizer = CharTokenizer('yes')
def chat(system):
    pairs = [('system', system), ('user', 'Bob Li cancels Friday'), ('assistant', '{"intent": "cancel"}')]
    return {'messages': [{'role': role, 'content': text} for role, text in pairs]}
rows = [chat('Extract the appointment as JSON.')] * 4
%lora use orders
%lora_train model --data rows --sample 1 --eval-data 2 --no-keep max_steps=2
"""


def test_the_system_prompt_of_the_training_rows_is_in_the_panels(
    open_notebook: Opener, pictures: Path, app: str
) -> None:
    page = open_notebook(
        MODEL, TRAINED, "%lora compare --panel", "%lora panel blend", '%lora ask "Bob" --max-new-tokens 9'
    )
    page.run_all()
    page.wait_for("greedy", cell=4)
    assert "Extract the appointment" in page.output_text(4)
    assert "wanted" in page.output_text(1) and '"cancel"' in page.output_text(1)
    panel, blend = page.output(2), page.output(3)
    field = panel.get_by_label("system prompt")
    expect(field).to_have_value("Extract the appointment as JSON.")
    expect(blend.get_by_label("system prompt")).to_have_value("Extract the appointment as JSON.")
    panel.get_by_label("Prompt", exact=True).fill("Bob Li, Friday")
    page.click("Send", cell=2)
    page.wait_for("answered in", cell=2)
    assert "system prompt: Extract the appointment as JSON." in page.output_text(2).replace("\n", "")
    for theme in ("light", "dark") if app == "lab" else ("light",):
        page.theme(theme) if app == "lab" else None
        for width in (600, 1280):
            page.page.set_viewport_size({"width": width, "height": 1000})
            page.screenshot(pictures / f"system-prompt-{app}-{width}-{theme}.png")
    page.click("New conversation", cell=2)
    prompt = panel.get_by_label("Prompt", exact=True)
    expect(prompt).to_have_attribute("placeholder", "A prompt")
    prompt.fill("Again")
    field.fill("Sing")
    page.click("Send", cell=2)
    page.wait_for("system prompt: Sing", cell=2)
    page.check()
