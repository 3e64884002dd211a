"""What cards and lines tell, and that nothing a person typed becomes markup."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser

import pytest

from nbpeft.state import MemoryPart, MemoryState
from nbpeft.widgets import styles, views
from tests.widgets.fakes import ADAPTERS, MEMORY, adapter, model, train_state

EVIL = '<script>alert("x")</script>\' onerror="y"'
VOID = {"img", "br", "path", "circle", "wbr"}


class Reader(HTMLParser):
    """The text of some HTML; fails where tags do not match or a tag is not one of ours."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        assert tag != "style"
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_model_card_shows_adapters_and_totals() -> None:
    text = Reader(views.model_card(model(memory=MEMORY))).text
    assert "model · LlamaForCausalLM" in text
    assert "140.4 M parameters · bfloat16 · cpu" in text
    assert "orders LoRA 16 / 32" in text
    assert "4,884,480 trainable of 140,366,688 (3.48 %)" in text
    assert "optimizer 37.0 MB" in text
    assert "free 131.0 MB of 582.0 MB on cpu" in text


def test_a_model_without_adapters_says_how_to_add_one() -> None:
    assert "%%lora model" in Reader(views.model_card(model(adapters=()))).text


def test_a_model_that_is_gone_is_said_to_be() -> None:
    assert "no model 'bert' any more" in Reader(views.model_card(None, "bert")).text
    assert "No model yet" in Reader(views.model_card(None)).text


@pytest.mark.parametrize(
    "html",
    [
        views.model_card(model(EVIL, (adapter(EVIL, method=EVIL, targets=(EVIL,)),), class_name=EVIL)),
        views.panel_head(model(EVIL), EVIL, busy=EVIL),
        views.panel_head(None, EVIL, busy=""),
        views.adapter_row(adapter(EVIL, method=EVIL, targets=(EVIL, EVIL, EVIL))),
        views.panel_note(views.missing_model(EVIL)),
        views.memory_bar(MemoryState(EVIL, (MemoryPart(EVIL, 5, EVIL),), 10, 5)),
        views.training_card(train_state(adapter=EVIL, message=EVIL), model_name=EVIL, hint=EVIL),
        views.training_card(train_state(adapter=EVIL, message=EVIL, status="failed"), model_name=EVIL),
    ],
)
def test_everything_typed_is_escaped(html: str) -> None:
    read = Reader(html)
    assert "onerror" not in read.attributes
    assert "<script>alert(" in "".join(read.words)


def test_rows_name_few_kinds_of_modules_and_count_many() -> None:
    assert views.modules(ADAPTERS[1]) == "60 · q_proj v_proj"
    assert views.modules(ADAPTERS[0]) == "210 · down_proj + 6"
    assert views.modules(adapter(targets=(), module_count=3)) == "3"


def test_mixed_ranks_have_a_star() -> None:
    assert views.rank_alpha(ADAPTERS[2]) == "8 / 8 *"
    assert views.rank_alpha(adapter(alpha=0.5)) == "16 / 0.5"


def test_rows_and_their_head_have_the_same_columns() -> None:
    head, row = (
        re.findall(r'<div class="([^"]*)"', html) for html in (views.row_head(), views.adapter_row(ADAPTERS[0]))
    )
    assert head == row
    assert len(head) == 8
    named = {name for kinds in head for name in kinds.split()}
    assert all(f".{name}" in styles.PANEL_CSS for name in named)


def test_colours_that_an_untrusted_notebook_drops_have_a_plain_one_before() -> None:
    html = views.training_card(train_state(status="finished")) + views.memory_bar(MEMORY)
    for style in re.findall(r'style="([^"]*)"', html):
        backgrounds = re.findall(r"background:([^;]*)", style)
        assert not backgrounds or "var(" not in backgrounds[0]


def test_the_memory_bar_fills_what_is_used_and_leaves_what_is_free() -> None:
    half = MemoryState("cuda:0", (MemoryPart("base weights", 40), MemoryPart("adapters", 10)), 100, 50)
    html = views.memory_bar(half)
    assert "width:40.00%" in html
    assert "width:10.00%" in html
    assert "elsewhere" not in html


def test_memory_of_others_is_told_from_free_memory() -> None:
    shared = MemoryState("cuda:0", (MemoryPart("base weights", 40),), 100, 10)
    assert "elsewhere 50 B" in Reader(views.memory_bar(shared)).text


def test_parts_of_a_large_device_fill_the_bar() -> None:
    small = MemoryState("cpu", (MemoryPart("base weights", 3), MemoryPart("adapters", 1)), 10_000, 5_000)
    assert "width:75.00%" in views.memory_bar(small)


def test_memory_without_a_device_total_is_shown() -> None:
    nothing = MemoryState("cpu", (), None, None)
    assert "on cpu" in Reader(views.memory_bar(nothing)).text
    assert views.memory_text(nothing) == "nothing measured · on cpu"
    assert "peak 3 B" in views.memory_text(dataclasses.replace(nothing, peak=3))


def test_the_training_card_shows_its_figures() -> None:
    text = Reader(views.training_card(train_state(25, 40, smoothed_loss=0.084), model_name="model")).text
    for words in (
        "training · orders",
        "running · model",
        "0.084 loss (smoothed)",
        "0.102 eval loss, step 20",
        "25 / 40 step · epoch 0.62",
        "241 tokens / s",
        "0:31 left of 1:22",
        "7.1e-4 learning rate",
    ):
        assert words in text


def test_the_figures_keep_their_places_before_they_are_known() -> None:
    early = views.training_card(train_state(0, None, learning_rate=None, tokens_per_second=None, remaining=None))
    late = views.training_card(train_state(25, 40))
    assert early.count("min-width:") == late.count("min-width:") == 6
    assert Reader(early).text.count(views.NONE) == 4


def test_a_running_chart_is_drawn_and_a_final_one_is_an_image() -> None:
    running, final = (views.training_card(train_state(status=status)) for status in ("running", "stopped"))
    assert "<svg" in running and "<img" not in running
    assert "<img" in final and "<svg" not in final


def test_messages_are_shown() -> None:
    stopped = train_state(status="stopped", message="stopped at step 25", remaining=None)
    assert "stopped at step 25" in Reader(views.training_card(stopped)).text
    assert "stopping after this step" in Reader(views.training_card(train_state(status="stopping"))).text


def test_lines_of_text() -> None:
    assert views.training_text(train_state(25, 40, smoothed_loss=0.084)) == (
        "training orders running: step 25/40 · loss 0.084 · eval loss 0.102 · 241 tokens/s · 0:31 left"
    )
    ended = train_state(25, 40, status="failed", message="out of memory", eval_loss=None, tokens_per_second=None)
    assert views.training_text(ended).endswith("· 0:51 · out of memory")
    assert views.model_text(model()).startswith("model · LlamaForCausalLM: orders* (LoRA), pirate (DoRA), sql (LoRA);")
    assert "no adapters" in views.model_text(model(adapters=()))
    assert "bert" in views.model_text(None, "bert")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (2.34567, "2.346"),
        (0, "0.000"),
        (0.00012, "1.20e-04"),
        (12345.0, "12,345"),
        (3e9, "3.00e+09"),
        (math.nan, "NaN"),
    ],
)
def test_losses(value: float | None, text: str) -> None:
    assert views.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0, "0:00"), (31, "0:31"), (82.4, "1:22"), (3723, "1:02:03"), (math.inf, "–"), (-1, "0:00")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert views.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0"), (7.1e-4, "7.1e-4"), (1e-10, "1.0e-10"), (1, "1.0e0")]
)
def test_learning_rates(value: float | None, text: str) -> None:
    assert views.learning_rate(value) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (9_999, "9,999"), (12_345, "12.3 k"), (134_515_008, "134.5 M"), (7 * 10**9, "7.0 B")],
)
def test_counts_of_headings(number: int, text: str) -> None:
    assert views.short_count(number) == text
