"""What cards and lines tell, and that nothing a person typed becomes markup."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from nbpeft.display import charts, numbers
from nbpeft.display.blocks import Block, Pill, Text, Tone, dim, line
from nbpeft.display.crosshair import style_rules
from nbpeft.display.html import head, to_html
from nbpeft.display.memory import memory_bar
from nbpeft.display.models import adapter_cells, adapter_table, condition, model_card, model_text, modules
from nbpeft.display.next_steps import NextSteps, next_steps
from nbpeft.display.training import training_card, training_text
from nbpeft.magics.lora import SUBCOMMANDS
from nbpeft.magics.parse import parse_line, prompt_text
from nbpeft.magics.tokenize import tokenize
from nbpeft.session.results import MemoryReport
from nbpeft.state import AdapterState, MemberState, MemoryPart, MemoryState, NamedRows, Sample, SessionState
from nbpeft.widgets import styles
from nbpeft.widgets.adapter_rows import adapter_row, row_head
from tests.widgets.fakes import ADAPTERS, MEMORY, adapter, model, train_state

EVIL = '<script>alert("x")</script>\' onerror="y"'
VOID = {"img", "br", "path", "circle", "wbr"}


class Reader(HTMLParser):
    """The text of some HTML; fails where tags do not match or a tag is not one of ours.

    The one style sheet is that of the values under the mouse.
    """

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
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert data == style_rules(charts.TOP, charts.BOTTOM)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(block: Block) -> Reader:
    return Reader(to_html(block))


def test_the_model_card_shows_adapters_and_totals() -> None:
    text = read(model_card(model(memory=MEMORY))).text
    assert "model (LlamaForCausalLM)" in text
    assert "140.4 M parameters, bfloat16, cpu" in text
    assert "orders LoRA r=16 α=32 210 down_proj + 6 4,884,480 19.5 MB active, trainable" in " ".join(text.split())
    assert "4,884,480 trainable of 140,366,688 (3.48 %)" in text
    assert "optimizer 37.0 MB" in text
    assert "free 131.0 MB of 582.0 MB on cpu" in text


def test_a_model_without_adapters_says_how_to_add_one() -> None:
    assert "%%lora model --name my_adapter" in read(model_card(model(adapters=()))).text


def test_a_model_that_is_gone_is_said_to_be() -> None:
    assert "no model 'bert' any more" in read(model_card(None, "bert")).text
    assert "No adapted model yet" in read(model_card(None)).text


@pytest.mark.parametrize(
    "html",
    [
        to_html(model_card(model(EVIL, (adapter(EVIL, method=EVIL, targets=(EVIL,)),), class_name=EVIL), hint=EVIL)),
        to_html(model_card(None, EVIL)),
        head(EVIL, EVIL),
        adapter_row(adapter(EVIL, method=EVIL, targets=(EVIL, EVIL, EVIL), summary={EVIL: EVIL})),
        to_html(memory_bar(MemoryState(EVIL, (MemoryPart(EVIL, 5, EVIL),), 10, 5))),
        to_html(training_card(train_state(adapter=EVIL, message=EVIL), model_name=EVIL, hint=EVIL)),
        to_html(training_card(train_state(adapter=EVIL, message=EVIL, status="failed"), model_name=EVIL)),
    ],
)
def test_everything_typed_is_escaped(html: str) -> None:
    read = Reader(html)
    assert "onerror" not in read.attributes
    assert "<script>alert(" in "".join(read.words)


def test_rows_name_few_kinds_of_modules_and_count_many() -> None:
    assert modules(ADAPTERS[1]).text == "q_proj v_proj"
    assert modules(ADAPTERS[0]).text == "down_proj +\u00a06"
    assert modules(ADAPTERS[0]).tooltip == "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
    assert modules(adapter(targets=(), module_count=3)).text == ""


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (ADAPTERS[0], "LoRA r=16 α=32"),
        (ADAPTERS[2], "LoRA r=8* α=8"),
        (adapter(summary={}), "LoRA"),
        (adapter(method="IA3", summary={"init": "ones"}), "IA3 init=ones"),
    ],
)
def test_a_method_says_what_its_settings_are(item: AdapterState, text: str) -> None:
    assert len(adapter_table((item,)).head) == len(adapter_cells(item))
    cell = adapter_cells(item)[0]
    assert isinstance(cell, tuple) and isinstance(cell[1], Text)
    assert cell[1].text == text and ("*" in text) == bool(cell[1].tooltip)


@pytest.mark.parametrize(
    ("changes", "words", "in_panel"),
    [
        ({"active": True}, "active, trainable", "active, trainable"),
        ({"active": True, "trainable": False, "frozen": True}, "active, frozen", "active, frozen"),
        ({"active": True, "scale": 0.5}, "active, trainable, ×\u00a00.5", "active, trainable, ×\u00a00.5"),
        ({"trainable": False}, "inactive", "inactive"),
        ({"trainable": False, "frozen": True}, "inactive, frozen", "inactive, frozen"),
        ({"active": True, "merged": True}, "merged", "merged"),
        ({"active": True, "unsaved": True}, "active, trainable, not saved", "active, not saved"),
        ({"trainable": False, "unsaved": True}, "inactive, not saved", "not saved"),
        ({"trainable": False, "frozen": True, "unsaved": True}, "inactive, frozen, not saved", "frozen, not saved"),
    ],
    ids=str,
)
def test_the_state_of_an_adapter_in_words(changes: dict[str, object], words: str, in_panel: str) -> None:
    state = adapter("a", **changes)
    assert condition(state) == words and condition(state, brief=True) == in_panel


def test_rows_and_their_head_have_the_same_columns() -> None:
    titles, row = (re.findall(r'<div class="([^"]*)"', html) for html in (row_head(), adapter_row(ADAPTERS[0])))
    assert titles == row
    assert len(titles) == 5
    named = {name for kinds in titles for name in kinds.split()}
    assert all(f".{name}" in styles.PANEL_CSS for name in named)


def test_a_long_name_keeps_its_end_and_says_all_of_it_in_its_tooltip() -> None:
    name = "experiment-2026-11-26-learning-rate-3e-4"
    row = adapter_row(adapter(name))
    assert f'title="{name}"' in row
    assert re.search(r'text-overflow:ellipsis">experiment-2026-11-26-learning-r</span><span[^>]*>ate-3e-4</span>', row)


def test_many_adapters_are_folded_in_a_card() -> None:
    html = to_html(model_card(model(adapters=[adapter(f"a{number}") for number in range(200)])))
    before, _, behind = html.partition("<summary>170 more</summary>")
    assert "a29" in before and "a30" not in before and "a199" in behind


def test_colours_that_an_untrusted_notebook_drops_have_a_plain_one_before() -> None:
    html = to_html((training_card(train_state(status="finished")), memory_bar(MEMORY)))
    for style in re.findall(r'style="([^"]*)"', html):
        backgrounds = re.findall(r"background:([^;]*)", style)
        assert not backgrounds or "var(" not in backgrounds[0]


def test_the_memory_bar_fills_what_is_used_and_leaves_what_is_free() -> None:
    half = MemoryState("cuda:0", (MemoryPart("base weights", 40), MemoryPart("adapters", 10)), 100, 50)
    html = to_html(memory_bar(half))
    assert "width:40.00%" in html
    assert "width:10.00%" in html
    assert "other programs" not in html


def test_memory_of_others_is_told_from_free_memory() -> None:
    shared = MemoryState("cuda:0", (MemoryPart("base weights", 40),), 100, 10)
    assert "other programs 50 B" in read(memory_bar(shared)).text


def test_parts_of_a_large_device_fill_the_bar() -> None:
    small = MemoryState("cpu", (MemoryPart("base weights", 3), MemoryPart("adapters", 1)), 10_000, 5_000)
    assert "width:75.00%" in to_html(memory_bar(small))


def test_what_libraries_take_is_a_figure_beside_the_bar_of_a_small_model() -> None:
    parts = (MemoryPart("base weights", 3_000_000), MemoryPart("adapters", 1_000_000), MemoryPart("other", 612_000_000))
    bar = memory_bar(MemoryState("cpu", parts, 24_000_000_000, 12_000_000_000))
    assert "width:75.00%" in to_html(bar)
    assert bar.note.startswith("other 612.0 MB")
    large = memory_bar(MemoryState("cpu", parts, 8_000_000, 0))
    assert [part.name for part in large.parts] == ["base weights", "adapters", "other"]


def test_memory_without_a_device_total_is_shown() -> None:
    nothing = MemoryState("cpu", (), None, None)
    assert "on cpu" in read(memory_bar(nothing)).text
    assert "peak 3 B" in read(memory_bar(dataclasses.replace(nothing, peak=3))).text
    assert str(MemoryReport(nothing)) == "memory on cpu: nothing measured"


def test_the_training_card_shows_its_figures() -> None:
    state = train_state(25, 40, loss=0.084, mean_loss=0.31, metrics={"accuracy": 0.91}, best_step=10, memory=MEMORY)
    text = read(training_card(state, model_name="model")).text
    for words in (
        "Training orders model running",
        "loss 0.084 mean 0.310",
        "eval loss 0.102 0.813 at best step 10",
        "accuracy 0.910 at step 20",
        "step 25 / 40 epoch 0.62",
        "tokens/s 241",
        "time left 0:31 after 0:51",
        "memory 451.0 MB",
        "optimizer 37.0 MB",
    ):
        assert words in text


def test_the_best_step_of_a_metric_is_not_called_the_best_loss() -> None:
    accuracy = {"metrics": {"accuracy": 0.6}, "metric_history": {"accuracy": ((10, 0.9), (20, 0.6))}}
    by_metric = read(training_card(train_state(25, 40, best_step=10, **accuracy))).text
    assert "eval loss 0.102 0.813 at best step 10" in by_metric
    assert "accuracy 0.600 0.900 at best step 10" in by_metric
    risen = train_state(25, 40, best_step=10, eval_loss=0.9, eval_history=((10, 0.8), (20, 0.9)), **accuracy)
    assert "eval loss 0.900 best 0.800 at step 10" in read(training_card(risen)).text
    last = read(training_card(train_state(25, 40, best_step=20, **accuracy))).text
    assert "eval loss 0.102 best, at step 20" in last and "accuracy 0.600 at step 20" in last


def test_the_figures_keep_their_places_before_they_are_known() -> None:
    unknown = train_state(0, None, learning_rate=None, tokens_per_second=None, remaining=None)
    early, late = to_html(training_card(unknown)), to_html(training_card(train_state(25, 40)))
    assert early.count("min-width:") == late.count("min-width:") == 6
    assert Reader(early).text.count(numbers.NONE) == 4


def test_a_running_chart_is_drawn_and_a_final_one_is_an_image() -> None:
    running, final = (to_html(training_card(train_state(status=status))) for status in ("running", "stopped"))
    assert "<svg" in running and "<img" not in running
    assert "<img" in final and "<svg" not in final


def test_messages_are_shown() -> None:
    stopped = train_state(status="stopped", message="stopped at step 25", remaining=None)
    assert "stopped at step 25" in read(training_card(stopped)).text
    assert "stopping after this step" in read(training_card(train_state(status="stopping"))).text


@pytest.mark.parametrize(("kind", "tone", "icon"), [("warnings", "warning", "⚠\ufe0e"), ("errors", "error", "✖")])
@pytest.mark.parametrize("status", ["running", "paused", "finished", "stopped"])
def test_a_problem_has_an_icon_and_a_colour_and_a_fact_has_none(kind: str, tone: Tone, icon: str, status: Any) -> None:
    """In one place, whether the run goes on or has ended; the status of one that has ended has the colour too."""
    message = "4 rows held out · the loss is NaN · goes on"
    shown = training_card(train_state(status=status, message=message, **{kind: ("the loss is NaN",)}))
    notes = (line(Text(f"{icon} the loss is NaN", tone)), line(dim("4 rows held out · goes on")))
    assert notes in shown.blocks
    assert (shown.aside[-1].tone == tone) == (
        status in ("finished", "stopped") or (status, tone) == ("paused", "warning")
    )


def test_without_a_problem_the_status_is_that_of_a_success() -> None:
    assert training_card(train_state(status="finished", message="4 rows held out")).aside[-1] == Pill(
        "finished", "success"
    )


def ended(**changes: Any) -> Any:
    done = train_state(40, 40, status="finished", remaining=None, folder="nbpeft_runs/orders-3")
    return dataclasses.replace(done, **changes)


def following(train: Any, *models: Any) -> NextSteps | None:
    return next_steps(train, SessionState(models or (model(),), "model"), "model")


def test_a_training_with_rewards_shows_them_with_the_best_and_the_worst_completion() -> None:
    samples = tuple(
        Sample(step, "2 + 2?", f"{word} of {step}", reward=reward)
        for step in (1, 2)
        for word, reward in (("four", 1.5), (EVIL, -0.5))
    )
    series = {"reward": ((1, 0.25), (2, 0.75)), "kl": ((1, 0.5),)}
    train = ended(series=series, samples=samples, headline=("reward",))
    text = read(training_card(train)).text
    assert "loss" not in text  # it says nothing here
    assert "reward 0.750 0.250 at step 1" in text and "kl 0.500" in text
    assert "best completion reward 1.500 · step 2 four of 2 worst completion reward -0.500 · step 2" in text
    assert "2 earlier completions" in text and text.count("2 + 2?") == 3
    assert "Step Reward Prompt Completion" in read(training_card(train)).text
    cut_off = ended(series={"reward": ((1, 0.25),)}, samples=(Sample(1, "2 + 2?", "fo", reward=1.0, cut=True),))
    assert "best completion reward 1.000 · step 1 fo …" in read(training_card(cut_off)).text
    empty = ended(series={"reward": ((1, 0.25),)}, samples=(Sample(1, "2 + 2?", "", reward=1.0),))
    assert "best completion reward 1.000 · step 1 (nothing)" in read(training_card(empty)).text


def test_sampled_answers_at_the_limit_of_tokens_end_in_an_ellipsis() -> None:
    samples = tuple(Sample(step, "2 + 2?", f"four of {step}", "five", "4", cut=True) for step in (1, 2))
    text = read(training_card(ended(samples=samples))).text
    assert "wanted 4 base five orders step 2 four of 2 …" in text and "1 four of 1 …" in text
    whole = [dataclasses.replace(sample, cut=False, base_cut=True) for sample in samples]
    text = read(training_card(ended(samples=tuple(whole)))).text
    assert "wanted 4 base five … orders step 2 four of 2" in text and "four of 2 …" not in text


class TestWhatFollowsATraining:
    def test_the_card_names_the_commands_and_says_whether_the_adapter_is_saved(self) -> None:
        for unsaved, words in ((True, "⚠\ufe0e not saved"), (False, "✓ saved")):
            steps = following(ended(), model(adapters=(adapter("orders", active=True, unsaved=unsaved),)))
            assert steps is not None and steps.saved is not unsaved
            text = read(training_card(ended(), next_steps=steps)).text
            assert words in text and ("Save %lora save adapters/orders --adapter orders" in text) is unsaved
            assert 'Ask %lora ask "your prompt" --adapter orders' in text
            assert "Compare %lora compare --panel" in text and "Ship %lora ship orders --for ollama" in text
            assert "Resume" not in text and "--model" not in text

    def test_a_classifier_is_scored_and_not_asked(self) -> None:
        steps = following(ended(), model(adapters=(adapter("orders", unsaved=True),), generates=False))
        assert steps is not None and [label for label, _ in steps.commands] == ["Save", "Score", "Ship"]
        assert steps.commands[-1][1] == "%lora ship orders --for transformers"

    def test_an_adapter_with_other_weights_is_not_told_as_that_of_the_training(self) -> None:
        steps = following(ended(), model(adapters=(adapter("orders"),), replaced=("orders",)))
        back = (("Restore", "%lora delete orders"), ("then", "%lora resume orders-3"))
        assert steps == NextSteps(None, "orders no longer has the weights of this training.", back)
        assert following(ended(), model(adapters=(adapter("orders"),), replaced=("other",))).saved

    def test_a_model_that_score_refuses_is_not_scored(self) -> None:
        of_rewards = model(adapters=(adapter("orders", unsaved=True),), generates=False, scored=False)
        steps = following(ended(), of_rewards)
        assert steps is not None and [label for label, _ in steps.commands] == ["Save", "Ship"]

    def test_completions_that_functions_reward_have_no_references_to_score(self) -> None:
        steps = following(ended(headline=("reward",)), model(adapters=(adapter("orders", unsaved=True),)))
        assert steps is not None and [label for label, _ in steps.commands] == ["Save", "Ask", "Compare", "Ship"]

    def test_nothing_follows_a_running_one_or_one_that_trained_nothing(self) -> None:
        for train in (train_state(25), ended(status="stopped", step=0), ended(status="stopped", kept_step=0)):
            assert following(train) is None
        assert following(ended(adapter="")) is None

    def test_with_several_models_the_commands_name_one(self) -> None:
        trained = model(adapters=(adapter("orders", unsaved=True),))
        steps = following(ended(samples=(Sample(3, 'Say "hi"\n\\o/', ""),)), trained, model("other"))
        assert steps is not None
        assert dict(steps.commands) == {
            "Save": "%lora save adapters/orders --adapter orders --model model",
            "Ask": "%lora ask 'Say \"hi\"\\n\\\\o/' --adapter orders --model model",
            "Compare": "%lora compare --panel --model model",
            "Score": "%lora score orders --data DATA --model model",
            "Ship": "%lora ship orders --for ollama --model model",
        }

    @pytest.mark.parametrize(
        "prompt",
        ["a " * 99 + "b", "it's", 'say "hi"', "{rows} and $x [0", "a\tb\\n\nc", 'it\'s "both"', "a" * 300, "\x1b[31m"],
    )
    def test_a_prompt_is_written_so_that_it_is_read_unchanged(self, prompt: str) -> None:
        steps = following(ended(samples=(Sample(3, prompt, ""),)))
        assert steps is not None
        word = tokenize(dict(steps.commands)["Ask"])[2]
        written = (
            len(prompt) <= 200 and prompt.replace("\n", "").replace("\t", "").isprintable() and "both" not in prompt
        )
        assert word.quoted and prompt_text(word.text) == (prompt if written else "your prompt")

    @pytest.mark.parametrize(
        "prompt", ["-x", "--adapter", "--adapter=q please", "--help", "--", "- a list", "-5 or 5?"]
    )
    def test_a_prompt_that_begins_with_a_dash_is_written_unless_it_reads_as_an_option(self, prompt: str) -> None:
        steps = following(ended(samples=(Sample(3, prompt, ""),)))
        assert steps is not None
        request = parse_line(dict(steps.commands)["Ask"].removeprefix("%lora "), SUBCOMMANDS, {})
        assert request is not None and not request.help
        assert request.options.prompt == (prompt if prompt.startswith(("- ", "-5 ")) else "your prompt")

    def test_the_rows_to_score_on_are_those_that_the_cell_named(self) -> None:
        for learned, label in ((False, "Score"), (True, "Score on its training rows")):
            steps = following(ended(rows=NamedRows("held_out --columns prompt=q", learned)))
            assert steps is not None
            assert dict(steps.commands)[label] == "%lora score orders --data held_out --columns prompt=q"

    def test_of_a_sweep_the_best_adapter_is_named_and_of_several_adapters_all(self) -> None:
        members = tuple(
            MemberState(name, "finished", 40, eval_loss=loss) for name, loss in (("sql", 2.0), ("pirate", 1.0))
        )
        trained = model(adapters=(adapter("sql", unsaved=True), adapter("pirate", unsaved=True)))
        swept = following(ended(adapter="sql, pirate", adapters=("sql", "pirate"), members=members), trained)
        several = following(ended(adapter="sql, pirate", adapters=("sql", "pirate")), trained)
        assert swept is not None and several is not None
        assert dict(swept.commands)["Save"] == "%lora save adapters/pirate --adapter pirate"
        assert several.commands == (
            ("Save", "%lora save adapters/sql --adapter sql"),
            ("Save", "%lora save adapters/pirate --adapter pirate"),
            ("Ask each", '%lora compare "your prompt" --adapters sql pirate'),
            ("Compare", "%lora compare --panel"),
            ("Score", "%lora score sql --data DATA"),
            ("Score", "%lora score pirate --data DATA"),
            ("Ship", "%lora ship sql --for ollama"),
            ("Ship", "%lora ship pirate --for ollama"),
        )
        own = NamedRows("", True, False, (("sql", "a.csv"), ("pirate", "b.csv --skip-bad")))
        scores = following(ended(adapter="sql, pirate", adapters=("sql", "pirate"), rows=own), trained)
        assert scores is not None
        assert [command for label, command in scores.commands if label == "Score on its training rows"] == [
            "%lora score sql --data a.csv",
            "%lora score pirate --data b.csv --skip-bad",
        ]

    def test_a_run_that_ended_early_can_be_resumed(self) -> None:
        steps = following(ended(status="stopped", step=23))
        assert steps is not None and dict(steps.commands)["Resume"] == "%lora resume orders-3"

    def test_an_adapter_that_is_gone_or_was_trained_again_is_not_saved_by_name(self) -> None:
        gone = following(ended(), model(adapters=()))
        assert gone == NextSteps(None, "orders is not on the model model.", (("Restore", "%lora resume orders-3"),))
        again = following(ended(), model(training=train_state(3, run_id="later")))
        assert again == NextSteps(None, "orders was trained further in a later run.")
        assert "saved" not in read(training_card(ended(), next_steps=again)).text
        other = following(ended(), model(training=train_state(3, run_id="later", adapter="sql")))
        assert other is not None and other.commands


def test_lines_of_text() -> None:
    assert training_text(train_state(25, 40, loss=0.084)) == (
        "training orders running: step 25/40 · loss 0.084 · eval loss 0.102 · 241 tokens/s · 0:31 left"
    )
    ended = train_state(25, 40, status="failed", message="out of memory", eval_loss=None, tokens_per_second=None)
    assert training_text(ended).endswith("· 0:51 · out of memory")
    assert model_text(model()).startswith("model (LlamaForCausalLM): orders* [LoRA], pirate [DoRA], sql [LoRA];")
    assert "no adapters" in model_text(model(adapters=()))
    assert "bert" in model_text(None, "bert")


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
    assert numbers.loss(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0, "0:00"), (31, "0:31"), (82.4, "1:22"), (3723, "1:02:03"), (math.inf, "–"), (-1, "0:00")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert numbers.clock(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0, "0"), (7.1e-4, "7.1e-4"), (1e-10, "1e-10"), (1, "1e0")])
def test_learning_rates(value: float | None, text: str) -> None:
    assert numbers.learning_rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.05, "0.05"), (5e-6, "5e-6"), (1e-4, "1e-4"), (2.555e-4, "2.555e-4"), (math.inf, "inf")],
)
def test_settings(value: float, text: str) -> None:
    assert numbers.setting(value) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (999, "999"),
        (9_999, "9,999"),
        (12_345, "12.3 k"),
        (134_515_008, "134.5 M"),
        (7 * 10**9, "7.0 B"),
        (999_949, "999.9 k"),
        (999_960, "1.0 M"),
        (999_950_000, "1.0 B"),
    ],
)
def test_counts_of_headings(number: int, text: str) -> None:
    assert numbers.short_count(number) == text
