"""Scores equal to scoring each row alone, and what happens when something is missing, wrong or stopped."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    LlamaConfig,
    LlamaForTokenClassification,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    T5Config,
)

from nbpeft import (
    IA3Config,
    LilyConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShadowConfig,
    get_peft_model,
    score,
    train,
)
from nbpeft.errors import AdapterError, ConfigError, MergeError, TrainingError
from nbpeft.scoring.answers import GivenAnswer, _answer, _Choosing
from nbpeft.scoring.in_training import RowScorer
from nbpeft.scoring.metrics import AnswerSettings, metrics_of
from nbpeft.scoring.rows import is_scored_by_default, read_rows
from nbpeft.scoring.score import Scoring
from nbpeft.scoring.settings import Column, ScoreSettings
from nbpeft.training.data.encoding import decoded
from nbpeft.training.watching.generation import PromptBatch
from tests.char_tokenizer import END, CharTokenizer
from tests.closeness import assert_approximates, assert_close
from tests.scoring.support import ROWS, adapted, alone, byte_tokenizer, everything
from tests.tiny_models import LLAMA, classifier, llama, randomize, same_state

TOKENIZER = CharTokenizer()
LIMIT = 12


def scored(model: Any, data: Any = ROWS, **options: Any) -> Any:
    return score(model, data, **{"tokenizer": TOKENIZER, "progress": False} | options)


@pytest.fixture(scope="module")
def many() -> Any:
    """A model with two LoRA, (IA)³, prompt tuning and prefix tuning."""
    model = adapted()
    model.add_adapter("ia3", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    model.add_adapter("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.add_adapter("prefix", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for seed, name in enumerate(("ia3", "prompt", "prefix")):
        randomize(model, name, seed + 5, 1.0)
    return model.eval()


COLUMNS = ("base", "sql", "chat", "ia3", "prompt", "prefix", "sql+chat")


@pytest.fixture
def answering(many: Any) -> Iterator[Any]:
    """(column, row, options) -> the answer of one column to one row by ``generate``."""

    def answer(column: str, row: Any, **options: Any) -> str:
        if column == "base":
            with many.disable_adapter():
                return alone(many, row, LIMIT, **options)
        many.set_adapter(column.split("+") if "+" in column else column)
        return alone(many, row, LIMIT, **options)

    yield answer
    many.set_adapter("sql")


def test_greedy_answers_equal_those_of_generate_one_by_one(many: Any, answering: Any) -> None:
    before = everything(many)
    result = scored(many, adapters=list(COLUMNS[1:]), max_new_tokens=LIMIT, batch_size=5)
    assert same_state(before[0], everything(many)[0]) and before[1:] == everything(many)[1:]
    assert result.columns == COLUMNS
    assert len(result.items) == len(ROWS)
    for item in result.items:
        row = ROWS[item.number]
        expected = {column: answering(column, row) for column in COLUMNS}
        assert item.answers == expected
        right = {column: float(text == row["completion"]) for column, text in expected.items()}
        assert item.values["exact"] == right
    assert len({item.answers["sql"] for item in result.items}) > 1


def test_sampled_answers_equal_those_of_the_row_alone(many: Any, answering: Any) -> None:
    """Each row has random numbers of its own, so that neither the batch nor the other columns matter."""
    settings = ScoreSettings(seed=3, temperature=0.9, top_p=0.8)
    given = {"seed": 3, "temperature": 0.9, "top_p": 0.8, "max_new_tokens": LIMIT}
    together = scored(many, ROWS[:4], adapters=list(COLUMNS[1:]), batch_size=3, **given)
    assert together.settings == {"temperature": 0.9, "top-p": 0.8, "seed": 3.0}
    for item in together.items:
        for column in together.columns:
            chosen = LogitsProcessorList([_Choosing(settings, [item.number])])
            assert item.answers[column] == answering(column, ROWS[item.number], logits_processor=chosen)
    other = scored(many, ROWS[:4], adapters=["sql", "prompt"], **given | {"seed": 4})
    assert [item.answers for item in other.items] != [item.answers for item in together.items]


def test_samples_have_the_distribution_of_the_logits() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 3.0]]).expand(4000, 4)
    choosing = _Choosing(ScoreSettings(temperature=2.0), range(4000))
    drawn = choosing(torch.zeros(4000, 1), logits).argmax(-1).bincount(minlength=4) / 4000
    # Four standard deviations of a share in 4000 draws.
    assert_approximates(drawn, (logits[0] / 2).softmax(-1), 0.03, scale=1.0)
    kept = _Choosing(ScoreSettings(temperature=2.0, top_p=0.7), range(4000))(torch.zeros(4000, 1), logits)
    assert kept.isfinite().any(0).tolist() == [True, False, False, True]


def test_a_merged_adapter_is_scored_alone() -> None:
    model = adapted()
    model.merge_adapter(["sql"])
    try:
        result = scored(model, max_new_tokens=LIMIT)
        assert result.columns == ("sql",)
        assert [item.answers["sql"] for item in result.items] == [alone(model, row, LIMIT) for row in ROWS]
        assert any("only 'sql' is scored" in note for note in result.notes)
        given = {"seed": 3, "temperature": 0.9, "max_new_tokens": LIMIT}
        for item in scored(model, ROWS[:4], batch_size=3, **given).items:
            drawn = LogitsProcessorList([_Choosing(ScoreSettings(seed=3, temperature=0.9), [item.number])])
            assert item.answers["sql"] == alone(model, ROWS[item.number], LIMIT, logits_processor=drawn)
        with pytest.raises(MergeError, match="unmerge before scoring other adapters"):
            scored(model, adapters="chat")
    finally:
        model.unmerge_adapter()


def test_the_base_may_be_named_like_an_adapter() -> None:
    assert scored(adapted(), ROWS[:2], adapters=["sql", "base"], include_base=False, max_new_tokens=1).columns == (
        "base",
        "sql",
    )
    assert scored(adapted(), ROWS[:2], adapters="base", include_base=False, max_new_tokens=1).columns == ("base",)


def test_a_model_without_adapters_is_scored() -> None:
    model = llama()
    result = scored(model, max_new_tokens=LIMIT)
    assert result.columns == ("base",)
    assert [item.answers["base"] for item in result.items] == [alone(model, row, LIMIT) for row in ROWS]
    with pytest.raises(AdapterError, match="has no adapters"):
        scored(model, adapters="sql")


def loss_alone(model: Any, row: dict[str, str]) -> tuple[float, int]:
    """The sum of the losses of a completion and its end token, and their number."""
    prompt, whole = (TOKENIZER(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
    ids = torch.tensor([[*whole, END]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -ids.shape[1] :]
    losses = F.cross_entropy(logits[0, len(prompt) - 1 : -1], ids[0, len(prompt) :], reduction="none")
    return float(losses.double().sum()), len(losses)


def test_losses_equal_a_loop(many: Any) -> None:
    names = ("sql", "ia3", "prompt", "prefix")
    result = scored(many, metric=["loss", "perplexity"], adapters=names, include_base=False, tokenizer=TOKENIZER)
    for name in names:
        many.set_adapter(name)
        found = [loss_alone(many, row) for row in ROWS]
        means = [item.values["loss"][name] for item in result.items]
        assert_close(means, [total / count for total, count in found])
        mean = sum(total for total, _ in found) / sum(count for _, count in found)
        assert_close(result.scores[name].value, mean)
        assert_close(result.by("perplexity").scores[name].value, math.exp(mean))
    many.set_adapter("sql")
    assert not result.facts.greater_is_better


def test_choices_equal_a_loop() -> None:
    model, options = adapted(), ["a", "bb", "c c c", "dd"]
    rows: list[Any] = [{"question": f"{number}?", "options": options, "key": number % 4} for number in range(8)]
    columns = {"prompt": "question", "choices": "options", "answer": "key"}
    result = scored(model, rows, metric=["choice", "choice_norm"], adapters="sql", include_base=False, columns=columns)
    model.set_adapter("sql")
    for item, row in zip(result.items, rows, strict=True):
        prompt = TOKENIZER(row["question"])["input_ids"]
        totals = []
        for option in row["options"]:
            ids = torch.tensor([[*prompt, *TOKENIZER(option)["input_ids"]]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            totals.append(-float(F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")))
        by_length = [total / len(option) for total, option in zip(totals, row["options"], strict=True)]
        assert item.values["choice"]["sql"] == float(totals.index(max(totals)) == row["key"])
        assert item.values["choice_norm"]["sql"] == float(by_length.index(max(by_length)) == row["key"])
        assert item.answers["sql"] == row["options"][totals.index(max(totals))]
        assert item.reference == row["options"][row["key"]]


def test_choices_have_the_likelihoods_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options, found = adapted(), [" a", " bb", " c c c"], {}
    rows: list[Any] = [{"prompt": f"{number}?" * (1 + number), "choices": options, "answer": 0} for number in range(5)]
    taken = Scoring._take_choices

    def take(self: Any, batch: Any) -> None:
        found.update({(place, column): losses for place, column, losses in batch})
        taken(self, batch)

    monkeypatch.setattr(Scoring, "_take_choices", take)
    scored(model, rows, metric="choice", batch_size=2)
    for column, name in enumerate(("base", "sql", "chat")):
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            model.set_adapter(name if name != "base" else "sql")
            for place, row in enumerate(rows):
                totals = [found[place, column][number][0] for number in range(3)]
                expected = [option_loss(model, row["prompt"], option) for option in options]
                assert_close(totals, expected)


def option_loss(model: Any, prompt: str, option: str) -> float:
    """The sum of the losses of an option that follows a prompt."""
    start, whole = len(TOKENIZER(prompt)["input_ids"]), TOKENIZER(prompt + option)["input_ids"]
    ids = torch.tensor([whole])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, start - 1 : -1]
    return float(F.cross_entropy(logits, ids[0, start:], reduction="none").double().sum())


def test_choices_equal_acc_and_acc_norm_of_lm_eval() -> None:
    """By their documented formula: the sum of the log-likelihoods, and it by the length of the choice alone."""
    words = ["ice", "a magnet", "the sun", "fog", "water vapour", "oak"]
    docs = [(f"Question: case {number}? Answer:", words[number % 3 :], number % 3) for number in range(9)]
    rows: list[Any] = [
        {"prompt": prompt, "choices": [f" {choice}" for choice in choices], "answer": gold}
        for prompt, choices, gold in docs
    ]
    model = adapted()
    result = scored(model, rows, metric=["choice", "choice_norm"], adapters="sql", include_base=False)
    model.set_adapter("sql")
    acc, acc_norm = [], []
    for prompt, choices, gold in docs:
        likelihoods = torch.tensor([-option_loss(model, prompt, f" {choice}") for choice in choices])
        acc.append(float(int(likelihoods.argmax()) == gold))
        by_length = likelihoods / torch.tensor([float(len(choice)) for choice in choices])
        acc_norm.append(float(int(by_length.argmax()) == gold))
    assert [item.values["choice"]["sql"] for item in result.items] == acc
    assert [item.values["choice_norm"]["sql"] for item in result.items] == acc_norm


def test_choices_may_be_given_with_labels_and_the_right_one_as_text() -> None:
    choices = {"text": ["yes", "no"], "label": ["A", "B"]}
    rows: list[Any] = [
        {"prompt": "1?", "choices": choices, "answer": "B"},
        {"prompt": "2?", "choices": ["yes", "no"], "completion": "no"},
        {"prompt": "3?", "choices": ["yes", "no"], "answer": "maybe"},
        {"prompt": "4?", "choices": ["yes"], "answer": 0},
        {"prompt": "5?", "choices": ["yes", "no"]},
    ]
    rows = [{"completion": "", **row} for row in rows]
    result = scored(adapted(), rows, metric="choice", adapters="sql")
    assert [item.reference for item in result.items] == ["no", "no"]
    (note,) = result.notes
    assert "3 rows left out" in note and "'maybe' is none of its 2 choices" in note and "row 4: it has no ref" in note


def test_classes_are_scored_with_heads_of_their_own() -> None:
    model = get_peft_model(classifier(), LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"), "first")
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    for seed, name in enumerate(("first", "second")):
        randomize(model, name, seed, 1.0)
    rows = [{"text": f"{number} is {'x' * number}", "label": number % 3} for number in range(9)]
    result = scored(model.eval(), rows, metric="accuracy", batch_size=4)
    for name in ("first", "second"):
        model.set_adapter(name)
        for item, row in zip(result.items, rows, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([TOKENIZER(row["text"])["input_ids"]])).logits
            assert item.values["accuracy"][name] == float(int(logits.argmax()) == row["label"])
    assert scored(model, rows).metric == "accuracy" and scored(adapted(), max_new_tokens=1).metric == "exact"
    with pytest.raises(ConfigError, match="is a classifier: its metric is accuracy"):
        scored(model, rows, metric="exact")
    with pytest.raises(ConfigError, match="accuracy is for classifiers"):
        scored(adapted(), metric="accuracy")


def tagger() -> Any:
    return LlamaForTokenClassification(LlamaConfig(**LLAMA, num_labels=3))


@pytest.mark.parametrize(
    ("base", "task", "row", "expected"),
    [
        (llama, "CAUSAL_LM", {"prompt": "a", "completion": "b"}, True),
        (classifier, "SEQ_CLS", {"text": "a", "label": 1}, True),
        (partial(classifier, num_labels=1), "SEQ_CLS", {"text": "a", "label": 0.5}, False),
        (tagger, "TOKEN_CLS", {"words": ["a"], "tags": [1]}, False),
    ],
)
def test_which_models_are_scored_without_a_metric(base: Callable[[], Any], task: str, row: Any, expected: bool) -> None:
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"], task_type=task), "sql").eval()
    assert is_scored_by_default(model) is expected
    try:
        scored(model, [row])
    except ConfigError:
        assert not expected
    else:
        assert expected


# Rows


def test_every_form_of_rows_has_the_same_reference() -> None:
    tokenizer = byte_tokenizer()
    model = adapted(vocab_size=len(tokenizer))
    turns = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": " 4"}]
    text = tokenizer("<|user|>2+2<|end|>\n<|assistant|>", add_special_tokens=False)["input_ids"]
    answer = tokenizer(" 4<|end|>\n", add_special_tokens=False)["input_ids"]
    for row in (
        {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "one"}, *turns]},
        {"messages": turns},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": " 4"}]},
        {"instruction": "2+2", "output": " 4"},
        {"input_ids": [*text, *answer], "labels": [-100] * len(text) + answer},
    ):
        result = scored(model, [row], tokenizer=tokenizer, max_new_tokens=2, adapters="sql", include_base=False)
        assert result.items[0].reference == " 4", row
        assert result.items[0].prompt.endswith("2+2") or "input_ids" in row


def test_an_answer_ends_with_the_turn_of_the_chat_template() -> None:
    """Even if the tokenizer's end token is another one."""
    tokenizer = byte_tokenizer()
    model = llama(vocab_size=len(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(end), len(tokenizer)).float())
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]}]
    result = scored(model, rows, tokenizer=tokenizer, max_new_tokens=5)
    assert result.items[0].answers == {"base": ""}
    assert not result.items[0].cut


def test_the_leading_space_of_an_answer_is_kept() -> None:
    """Sentencepiece tokenizers drop it where tokens are decoded alone."""
    from nbpeft.training.data.encoding import decoded

    class Spaced(CharTokenizer):
        def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
            return super().decode(tokens).removeprefix(" ")

    assert decoded(Spaced(), TOKENIZER("is")["input_ids"], TOKENIZER(" 42")["input_ids"]) == " 42"


def test_a_metric_of_the_user_needs_no_reference() -> None:
    seen = []

    def short(answer: str, row: Any) -> bool:
        seen.append(row)
        return len(answer) < 3

    for rows in (["Hi", "Ho"], [{"prompt": "Hi", "more": 1}, {"prompt": "Ho", "more": 2}]):
        result = scored(adapted(), rows, metric=short, adapters="sql", max_new_tokens=4)
        assert result.facts.is_share
        assert seen[-1] == rows[1]


def test_rows_without_a_reference_are_named() -> None:
    result = scored(adapted(), [*ROWS[:2], {"prompt": "x", "completion": ""}], max_new_tokens=2)
    assert result.notes[0] == "1 row left out: row 2: it has no reference"
    with pytest.raises(TrainingError, match=r"no reference\. Text has no answer to compare: metric='loss' scores it"):
        scored(adapted(), ["a text"])
    with pytest.raises(TrainingError, match="None of the 1 row can be scored: row 0: it has no reference"):
        scored(adapted(), ["only text"])
    for columns, named in (({}, "answer"), ({"prompt": "q"}, "reply")):
        rows = [{columns.get("prompt", "prompt"): "x", named: "a", "id": "1"}]
        with pytest.raises(TrainingError, match=f"'completion': '{named}'"):
            scored(adapted(), rows, columns=columns or None)


@pytest.mark.parametrize("metric", ["exact", "loss"])
def test_preferences_are_scored_by_the_chosen_completion(metric: str) -> None:
    pairs = [{"prompt": "x", "chosen": "ab", "rejected": "b"}, {"prompt": "xy", "chosen": "ba", "rejected": "a"}]
    alone = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    renamed = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in pairs]
    limit = {"max_new_tokens": 2} if metric == "exact" else {}
    expected = scored(adapted(), alone, metric=metric, **limit)
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    for rows, names in ((pairs, None), (renamed, columns), (pairs, {"completion": "chosen"})):
        found = scored(adapted(), rows, metric=metric, columns=names, **limit)
        assert [item.reference for item in found.items] == ["ab", "ba"]
        assert [item.values for item in found.items] == [item.values for item in expected.items]
    result = scored(adapted(), renamed, metric=metric, columns=columns, **limit)
    assert result.notes[0] == "the references are the completions in 'good'"


def test_conversations_of_which_one_is_preferred_are_scored_by_its_last_turn() -> None:
    tokenizer = byte_tokenizer()
    model = llama(vocab_size=len(tokenizer))
    asked = [{"role": "user", "content": "Hi"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("ab", "b"))
    expected = scored(model, [{"messages": asked + good}], tokenizer=tokenizer, max_new_tokens=2)
    for row in ({"prompt": asked, "chosen": good, "rejected": bad}, {"chosen": asked + good, "rejected": asked + bad}):
        found = scored(model, [row], tokenizer=tokenizer, max_new_tokens=2)
        assert [(item.prompt, item.reference, item.answers) for item in found.items] == [
            (item.prompt, item.reference, item.answers) for item in expected.items
        ]
        assert found.items[0].reference == "ab"


def test_cut_answers_are_counted() -> None:
    result = scored(adapted(), ROWS[:3], max_new_tokens=2, adapters="sql")
    assert any(note.startswith("answers cut at 2 tokens (max_new_tokens): base") for note in result.notes)
    assert result.items[0].cut <= {"base", "sql"}


def test_a_cut_answer_does_not_end_within_a_character() -> None:
    class Bytes:
        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            return bytes(ids).decode(errors="replace")

    batch = PromptBatch(("a",), ((97,),), Bytes(), 0, frozenset({0}))
    tokens = list(" né".encode())
    assert _answer(batch, [97], tokens, 4, finite=True).text == " né"
    assert _answer(batch, [97], tokens[:3], 3, finite=True) == GivenAnswer(" n", cut=True, finite=True)
    assert _answer(batch, [97], [*tokens[:3], 0], 4, finite=True).text == " n\ufffd"  # the model has ended it there


def test_top_p_alone_samples_as_in_a_question() -> None:
    model = adapted()
    given = {"top_p": 0.9, "seed": 3, "max_new_tokens": LIMIT}
    alone, both = scored(model, ROWS[:4], **given), scored(model, ROWS[:4], temperature=1.0, **given)
    assert [item.answers for item in alone.items] == [item.answers for item in both.items]
    assert alone.settings == {"top-p": 0.9, "seed": 3.0}
    assert [item.answers for item in scored(model, ROWS[:4], max_new_tokens=LIMIT).items] != [
        item.answers for item in alone.items
    ]


def test_answers_that_can_no_longer_become_right_are_cut_without_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbpeft.scoring.answers._MARGIN", 0)
    rows = [{"prompt": "0 is", "completion": "zz"}]
    for options, noted in (({}, False), ({"max_new_tokens": 2}, True), ({"metric": ["exact", "contains"]}, True)):
        result = scored(adapted(), rows, adapters="sql", include_base=False, **options)
        assert result.items[0].cut == {"sql"} and "zz" not in result.items[0].answers["sql"]
        assert any(note.startswith("answers cut at") for note in result.notes) is noted, options


def test_outputs_that_are_no_numbers_are_named_and_the_others_kept() -> None:
    model = adapted()
    with torch.no_grad():
        next(iter(model.manager.parameters("chat"))).fill_(math.nan)
    for metric in ("exact", "loss"):
        result = scored(model, ROWS[:3], metric=metric)
        assert "chat: its outputs are not numbers (NaN) at rows 0, 1, 2" in result.notes
        assert not math.isnan(result.scores["sql"].value)
        assert "chat" in str(result) and "NaN" in str(result)
    assert math.isnan(result.scores["chat"].value)
    assert "nan" not in result._repr_html_()


# Stopped and failing


@pytest.mark.parametrize("how", ["stop", "interrupt", "interrupted metric"])
def test_a_stop_keeps_what_is_scored(how: str) -> None:
    model = adapted().train()
    before, calls = everything(model), []

    def stops() -> bool:
        calls.append(1)
        if how == "interrupt" and len(calls) > 20:
            raise KeyboardInterrupt
        return how == "stop" and len(calls) > 20

    def own(answer: str, row: Any) -> bool:
        if how == "interrupted metric" and row is ROWS[-1]:
            raise KeyboardInterrupt
        return True

    rows = sorted(ROWS, key=lambda row: -len(row["prompt"]))
    result = scored(model, rows, metric=own, max_new_tokens=LIMIT, batch_size=4, should_stop=stops)
    assert result.status == "stopped"
    assert 0 < len(result.items) < len(rows)
    assert {score.count for score in result.scores.values()} == {len(result.compared)}
    assert f"stopped after {len(result.compared)} of 12 items" in str(result)
    assert same_state(before[0], everything(model)[0]) and before[1:] == everything(model)[1:]


@pytest.mark.parametrize("only", [[0, 3], (3, 0), range(0, 4, 3), np.array([0, 3]), torch.tensor([3, 0]), iter([0, 3])])
def test_rows_are_picked_by_their_numbers(only: Any) -> None:
    assert [item.number for item in scored(adapted(), metric="loss", held_out=only).items] == [0, 3]


@pytest.mark.parametrize(
    "only", [3, True, float("nan"), "0", [], [None], [-1], [len(ROWS)], [True], [1.5], torch.tensor(0), np.array([[0]])]
)
def test_rows_that_are_no_numbers_of_rows_are_refused_in_one_line(only: Any) -> None:
    with pytest.raises(ConfigError, match=r"^held_out (must be numbers of rows|has (no )?row)"):
        scored(adapted(), metric="loss", held_out=only)


def test_rows_that_are_too_long_are_read_as_in_the_training_or_as_asked() -> None:
    tokenizer: Any = CharTokenizer()
    texts = [{"text": "ab" * length} for length in (2, 3, 12)]
    whole = scored(adapted(), data=texts, metric="loss", include_base=False, adapters="sql")
    parts = scored(adapted(), data=texts, metric="loss", include_base=False, adapters="sql", max_length=9, long="split")
    assert [item.number for item in parts.items] == [0, 1, 2]
    assert [item.weight for item in parts.items] == [item.weight for item in whole.items]  # each token once
    assert "split" in " ".join(parts.notes) and len(scored(adapted(), data=texts, metric="loss", long="cut").items) == 3
    with pytest.raises(ConfigError, match="long='split' is for loss and perplexity"):
        scored(adapted(), data=texts, metric="json_valid", long="split")
    with pytest.raises(ConfigError, match="long='drop' has no effect: prompts are answered whole"):
        scored(adapted(), data=[{"prompt": "a"}], metric="json_valid", long="drop")
    with pytest.raises(ConfigError, match=r"long must be cut, drop, split, not 'dropp'. Did you mean 'drop'"):
        scored(adapted(), metric="loss", long="dropp")
    rows = [{"prompt": "ab", "completion": "cd" * length} for length in (1, 2, 12)]
    model = adapted()
    model.set_adapter("sql")
    settings: dict[str, Any] = {"max_steps": 1, "tokenizer": tokenizer}
    train(model, rows, **settings, max_length=9, long="drop", learning_rate=1e-3)
    for metric in ("exact", "loss"):
        found = scored(model, data=rows, metric=metric, adapters="sql", include_base=False)
        assert [item.number for item in found.items] == [0, 1]
        assert "row 2: longer than 9 tokens (long='drop')" in " ".join(found.notes)
        assert len(scored(model, data=rows, metric=metric, adapters="sql", long="cut").items) == 3
    assert len(scored(model, data=rows, metric="exact", adapters="chat").items) == 3  # not trained on them
    assert len(scored(model, data=texts, metric="loss", adapters="sql", general=False).items) == 2
    watched = train(model, texts, **settings, max_length=9, long="split", score=texts, metric="loss", every=1)
    split = scored(model, data=texts, metric="loss", adapters="sql", include_base=False)
    assert watched.state.metrics.get("loss", watched.state.eval_loss) == pytest.approx(split.scores["sql"].value)
    assert split.items[2].weight == whole.items[2].weight


def test_a_metric_that_fails_on_some_rows_names_the_first() -> None:
    def own(answer: str, row: Any) -> float:
        return 1 / (row is not ROWS[2])

    result = scored(adapted(), metric=own, max_new_tokens=2, adapters=["sql", "chat"])
    (note,) = (note for note in result.notes if "own" in note)
    assert note.startswith("metric 'own' fails at row 2: ZeroDivisionError: division by zero (answer of ")
    assert note.endswith("3 answers not counted")
    assert result.scores["sql"].count == len(ROWS) - 1


def test_a_metric_that_fails_on_all_rows_ends_it_at_once() -> None:
    calls = []

    def own(answer: str, row: Any) -> float:
        calls.append(1)
        raise KeyError("target")

    model = adapted().train()
    before = everything(model)
    for metric in (own, ["loss", own]):  # also if something else would be computed first
        with pytest.raises(
            TrainingError, match=r"row 0: KeyError: 'target'; it fails on the references of the first 8"
        ):
            scored(model, metric=metric, max_new_tokens=2, batch_size=2)
    assert len(calls) == 2 * 8
    with pytest.raises(TrainingError, match="it fails on the references of the first 8 rows"):  # and before a training
        RowScorer(model, ROWS, own, tokenizer=CharTokenizer())
    rows = [{"prompt": row["prompt"]} for row in ROWS]  # nothing to try it on
    calls.clear()
    with pytest.raises(TrainingError, match=r"fails at row .*: KeyError: 'target'.*all rows of the first batch"):
        scored(model, data=rows, metric=own, max_new_tokens=2, batch_size=2)
    assert len(calls) == 2 * 3
    assert same_state(before[0], everything(model)[0]) and before[1:] == everything(model)[1:]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ConfigError, "batch_size must be a whole number of at least 1"),
        ({"skip_bad": "yes"}, ConfigError, "skip_bad must be True or False, not 'yes'"),
        ({"strip": "no"}, ConfigError, "strip must be True or False"),
        ({"casefold": 1}, ConfigError, "casefold must be True or False"),
        ({"include_base": "sql"}, ConfigError, "include_base must be True or False, not 'sql'"),
        ({"general": "no"}, ConfigError, "general must be True or False"),
        ({"data": None}, ConfigError, "data is missing"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens must be"),
        ({"seed": -1}, ConfigError, "seed must be"),
        ({"temperature": -1}, ConfigError, "temperature must be"),
        ({"top_p": 0.5, "temperature": 0}, ConfigError, "top_p has no effect on greedy answers"),
        ({"metric": "loss", "top_p": 0.5}, ConfigError, "top_p is for metrics of answers"),
        ({"metric": "loss", "temperature": 1}, ConfigError, "temperature is for metrics of answers"),
        ({"metric": "loss", "max_new_tokens": 3}, ConfigError, "max_new_tokens is for metrics of answers"),
        ({"tokenizer": None}, ConfigError, "a tokenizer is needed to score answers"),
        ({"adapters": "sqll"}, AdapterError, "sqll"),
        ({"adapters": "sql+chatt"}, AdapterError, "chatt"),
        ({"adapters": [], "include_base": False}, AdapterError, "nothing to score"),
        ({"adapters": 3}, AdapterError, "adapters must be names"),
        ({"columns": {"choices": "opts"}}, ConfigError, "the rows have no 'opts' for choices"),
        ({"columns": {"promt": "x"}}, TrainingError, "promt"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_answered(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scored(adapted(), **{"data": ROWS} | options)


@pytest.mark.parametrize("metric", ["exact", "loss"])
def test_rows_are_computed_in_parts_where_memory_is_short(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = adapted(), []
    expected = scored(model, metric=metric, **({"max_new_tokens": 3} if metric == "exact" else {}))
    forward = type(model).forward if metric == "loss" else type(model).generate
    most = [7]

    def short_of_memory(self: Any, *args: Any, **inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(model), "forward" if metric == "loss" else "generate", short_of_memory)
    options = {"max_new_tokens": 3} if metric == "exact" else {}
    found = scored(model, metric=metric, **options)
    assert max(sizes) > 7 and min(sizes) < 7
    values, wanted = ([item.values[metric] for item in one.items] for one in (found, expected))
    assert_close(values, wanted)
    most[0] = 1
    with pytest.raises(AdapterError, match="out of memory with one row: score fewer adapters"):
        scored(model, metric=metric, **options)


def test_progress_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbpeft.scoring.score.INTERVAL", 0.0)
    seen: list[Any] = []
    scored(adapted(), max_new_tokens=2, batch_size=4, on_progress=seen.append)
    assert "each answer has at most 2 tokens" in seen[0]._repr_html_()
    assert [result.done for result in seen] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert all(result.status == "running" for result in seen)
    assert "exact so far: base" in seen[1]._repr_html_()


# What it cost elsewhere


def test_the_loss_on_further_rows_is_measured_too() -> None:
    model, texts = adapted(), ["The sun rose.", "Bread needs flour."]
    result = scored(model, max_new_tokens=2, also=texts)
    alone = scored(model, texts, metric="loss").scores
    assert result.elsewhere.scores.keys() == alone.keys()
    assert [one.value for one in result.elsewhere.scores.values()] == [one.value for one in alone.values()]
    base, sql = (result.elsewhere.scores[name].value for name in ("base", "sql"))
    words = f"loss on the further rows {base:.3f} with base, {sql:.3f} with sql ({100 * (sql / base - 1):+.1f} %), "
    assert words in str(result) and words in result._repr_html_()
    assert result.status == "finished" and len(result.items) == len(ROWS)


def test_the_package_has_a_general_text() -> None:
    tokenizer = byte_tokenizer()
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    result = scored(model, ROWS[:2], tokenizer=tokenizer, max_new_tokens=1, general=True)
    assert len(result.elsewhere.items) == 38
    texts = [item.prompt for item in result.elsewhere.items]
    assert 19_500 < sum(len(text.encode()) + 2 for text in texts) < 20_500
    for known in ("When in the Course", "We the People", "Four score and seven", "With malice toward none"):
        assert sum(text.startswith(known) for text in texts) == 1, known
    assert "loss on general text" in str(result)


def test_a_stop_before_the_further_rows_leaves_them_out() -> None:
    calls: list[int] = []

    def stops() -> bool:
        calls.append(1)
        return len(calls) > 2

    result = scored(adapted(), batch_size=2, also=["The sun rose."], should_stop=stops, max_new_tokens=2)
    assert (result.status, result.elsewhere) == ("stopped", None)
    with pytest.raises(ConfigError, match="exclude each other"):
        scored(adapted(), also=["x"], general=True)


# Kinds of models


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_answers_as_alone(kind: str) -> None:
    """Its encoder is padded on the right, and its answers do not follow the prompts."""
    if kind == "t5":
        config: Any = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        config.decoder_start_token_id = 0
    else:
        sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 4, "d_model": 32}
        config = BartConfig(vocab_size=97, max_position_embeddings=64, **sizes, **layers, forced_eos_token_id=None)
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(config).eval()
    targets = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets), "sql")
    randomize(model, "sql", 0, 1.0)
    result = scored(model.eval(), ROWS[:5], metric=["exact", "loss"], max_new_tokens=6, batch_size=3)
    for item in result.items:
        ids = torch.tensor([TOKENIZER(ROWS[item.number]["prompt"])["input_ids"]])
        labels = torch.tensor([TOKENIZER(ROWS[item.number]["completion"])["input_ids"]])
        ends = [model.generation_config.eos_token_id, END]
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # transformers 5.0 guesses another mask
        tokens = model.generate(**asked, max_new_tokens=6, do_sample=False, eos_token_id=ends)[0, 1:].tolist()
        answer = [token for n, token in enumerate(tokens) if not set(tokens[: n + 1]) & set(ends)]
        assert item.answers["sql"] == TOKENIZER.decode(answer)
        with torch.no_grad():
            assert_close(item.values["loss"]["sql"], float(model(input_ids=ids, labels=labels).loss))


def test_a_method_that_needs_its_batch_alone_gets_it() -> None:
    model = adapted()
    model.add_adapter("shadow", ShadowConfig(task_type="CAUSAL_LM", init_weights=False))
    result = scored(model.eval(), ROWS[:4], metric=["exact", "loss"], max_new_tokens=4)
    assert result.columns == ("base", "sql", "chat", "shadow")
    model.set_adapter("shadow")
    assert [item.answers["shadow"] for item in result.items] == [alone(model, row, 4) for row in ROWS[:4]]


@pytest.mark.parametrize("source", ["stream", "table", "file"])
def test_rows_come_from_every_source_of_training(source: str, tmp_path: Path) -> None:
    rows: Any = ROWS[:3]
    if source == "stream":
        rows = datasets.Dataset.from_list(ROWS[:3]).to_iterable_dataset()
    elif source == "table":
        rows = pandas.DataFrame(ROWS[:3])
    else:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    result = scored(adapted(), rows, max_new_tokens=2, adapters="sql", include_base=False)
    assert [item.reference for item in result.items] == [row["completion"] for row in ROWS[:3]]


def test_bad_completions_are_no_references() -> None:
    rows = [{"prompt": f"{number}>", "completion": "b", "label": number % 2} for number in range(4)]
    result = scored(adapted(), rows, metric="exact")
    assert result.notes[0] == "2 rows left out: rows 0, 2: its label marks the completion as bad"
    assert [item.number for item in result.items] == [1, 3]
    classes = [{**row, "label": row["label"] + 1} for row in rows]  # not good and bad
    assert len(scored(adapted(), classes, metric="exact").items) == 4


@pytest.mark.parametrize("metric", ["exact", "startswith", "contains"])
def test_an_answer_with_the_learned_tokens_is_right_whatever_decoding_puts_before_it(metric: str) -> None:
    """A tokenizer of words decodes a space before every one, also before the first word of an answer."""
    words = ["[UNK]", "[PAD]", "[END]", *["red", "blue", "green", "one", "two", "three", "is", "colour"]]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]")
    rows = [
        {"prompt": f"{number} is", "completion": colour} for number, colour in zip(words[6:9], words[3:6], strict=True)
    ]
    rows.append({"prompt": "one is", "completion": "purple red"})  # of which it knows one word
    metrics = metrics_of(metric, AnswerSettings())
    state = Scoring("", (Column("sql"),), metrics, read_rows(llama(), rows, metrics, tokenizer), ScoreSettings(), [])
    learned = [tokenizer(row["completion"])["input_ids"] for row in rows[:3]]
    answers = [decoded(tokenizer, tokenizer("one is")["input_ids"], tokens) for tokens in learned]
    assert answers == [" red", " blue", " green"]
    state._take_answers([(place, 0, GivenAnswer(answer)) for place, answer in enumerate([*answers, " red"])])
    assert [item.values[metric]["sql"] for item in state.result("finished").items] == [1.0, 1.0, 1.0, 0.0]
    assert [item.answers["sql"] for item in state.result("finished").items] == ["red", "blue", "green", " red"]


def test_scores_of_a_method_that_mixes_rows_say_so() -> None:
    model = get_peft_model(llama(), LilyConfig(r=2, target_modules=["q_proj"]), "lily")
    assert any("lily: its method mixes the rows of a batch" in note for note in scored(model).notes)
    assert not any("mixes" in note for note in scored(adapted()).notes)
