"""What ``%lora data`` shows, in a real browser: in the width there is, and after the notebook is opened again."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect

from tests.browser.conftest import Opener

pytestmark = pytest.mark.browser

SETUP = """\
from tests.training.test_data import CHATML
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers, decoders
%load_ext nbpeft

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
special = ["<|end|>", "<|user|>", "<|assistant|>"]
core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate([*special, *alphabet])}, merges=[]))
core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", chat_template=CHATML)
tok.add_special_tokens({"additional_special_tokens": special[1:]})
rows = [
    {"instruction": f"Write the order for {7 * n} lamps. <b>&amp;</b>", "output": "NP35-31-N1, " * (1 + n % 5)}
    for n in range(60)
]"""
FIRST_ROW = "<|user|>Write the order for 0 lamps. <b>&amp;</b><|end|>"


def overflow(card: Locator) -> int:
    """Pixels by which something of a card is wider than it."""
    return int(card.evaluate("card => card.scrollWidth - card.clientWidth"))


def test_rows_are_shown_as_the_model_reads_them(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(SETUP, "%lora data rows --max-length 100")
    page.run_all()
    page.wait_for("12 of 60 rows cut to 100 tokens", cell=1)
    card = page.output(1).locator("div", has_text="training data").first
    for width in (1280, 800, 600):
        page.page.set_viewport_size({"width": width, "height": 1000})
        expect(page.output(1).get_by_text(FIRST_ROW)).to_be_visible()
        assert overflow(card) <= 0
        page.screenshot(pictures / f"data-{app}-{width}.png")
    assert page.output(1).locator("b", has_text="amp").count() == 0
    page.save()
    page.page.set_viewport_size({"width": 1280, "height": 1000})
    page.reopen()
    learned = page.output(1).locator("span[style*='rgba(84']")
    expect(learned.filter(has_text="NP35-31-N1").first).to_be_visible()
    if app == "lab":
        page.theme("dark")
    page.screenshot(pictures / f"data-{app}-again.png")
    page.check()


def test_a_notebook_that_is_not_trusted_shows_it_too(open_notebook: Opener, pictures: Path, app: str) -> None:
    """Its sanitizer takes scripts, variables of the theme and some styles away."""
    from nbpeft.session import get_session
    from tests.char_tokenizer import CharTokenizer

    rows = [{"prompt": f"{number} is ", "completion": "a<b " * (1 + number % 3)} for number in range(30)]
    result = get_session().data(rows, CharTokenizer(), max_length=14)
    page = open_notebook(shown=[{"text/html": result._repr_html_(), "text/plain": "hidden"}])
    page.wait_for("rows cut to 14 tokens", cell=0)
    bars = [bar.bounding_box() for bar in page.output(0).locator("div[title*=' rows']").all()]
    filled = [bar for bar in bars if bar is not None and bar["height"] > 1]
    assert len(filled) > 1
    assert len({round(bar["y"] + bar["height"]) for bar in filled}) == 1  # they stand beside each other
    assert len({round(bar["x"]) for bar in filled}) == len(filled)
    marked = page.output(0).locator("span[style*='background']", has_text="a<b").first
    assert marked.evaluate("span => getComputedStyle(span).backgroundColor") == "rgba(84, 162, 75, 0.3)"
    page.screenshot(pictures / f"data-{app}-untrusted.png")


def test_text_between_dollar_signs_is_no_mathematics(open_notebook: Opener, pictures: Path, app: str) -> None:
    money = "I paid $35 and was charged $70."
    control = "from IPython.display import HTML\nHTML('<p>$x^2$</p>')"
    page = open_notebook(SETUP, f"rows[0]['instruction'] = {money!r}\n%lora data rows --rows 1", control)
    page.run_all()
    page.wait_for("training data", cell=1)
    expect(page.output(2).locator("mjx-container")).to_have_count(1)  # mathematics of others is typeset
    for again in (False, True):
        if again:
            page.save()
            page.reopen()
            expect(page.output(2).locator("mjx-container")).to_have_count(1)
        expect(page.output(1).get_by_text(money).first).to_be_visible()
        expect(page.output(1).locator("mjx-container")).to_have_count(0)
    page.screenshot(pictures / f"data-{app}-money.png")
