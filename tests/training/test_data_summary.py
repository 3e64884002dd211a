"""What is shown of data is what a training reads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example
from hypothesis import strategies as st

from nbpeft.names import PAIRS
from nbpeft.training import prepare_data, summarize
from nbpeft.training.data import ModelInputs
from nbpeft.training.data.summary import _round_width, bins_of
from tests.char_tokenizer import CharTokenizer
from tests.training.test_data import tokenizer as tokenizer
from tests.untimed import given

CHAT = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes and no"}]
ROWS = [
    *({"prompt": f"{number} is ", "completion": "yes " * number} for number in range(1, 9)),
    {"prompt": "the cat sat on the mat " * 4, "completion": "no"},
    {"prompt": "is it?", "completion": ""},
]


def text(spans: Any, **kind: bool) -> str:
    return "".join(span.text for span in spans if all(getattr(span, name) is value for name, value in kind.items()))


@pytest.mark.parametrize("data", [ROWS, [{"messages": CHAT}] * 5, [{"text": "the cat"}] * 4])
@pytest.mark.parametrize("max_length", [None, 12])
def test_counts_are_those_of_the_rows_that_are_trained_on(tokenizer: Any, data: Any, max_length: Any) -> None:
    rows = prepare_data(data, tokenizer, max_length=max_length)
    found = summarize(data, tokenizer, max_length=max_length)
    assert (found.row_count, found.token_count) == (len(rows), rows.token_count)
    assert (found.cut_rows, found.left_out_count) == (rows.truncated, rows.dropped)
    assert found.learned_count == sum(label != -100 for row in rows for label in row["labels"][1:])
    assert sum(number for *_, number in found.bins) == len(rows)


def test_the_rows_shown_are_those_that_are_trained_on(tokenizer: Any) -> None:
    data = [{"prompt": "is it? ", "completion": "yes and no"}]
    [shown] = summarize(data, tokenizer).rows
    [row] = prepare_data(data, tokenizer)
    assert text(shown.spans) == tokenizer.decode(row["input_ids"])
    assert text(shown.spans, learned=True) == tokenizer.decode([label for label in row["labels"] if label != -100])
    assert text(shown.spans, special=True) == "<|end|>"
    assert (shown.token_count, shown.learned_count) == (len(row["input_ids"]), sum(x != -100 for x in row["labels"]))


def test_a_template_shows_with_its_special_tokens(tokenizer: Any) -> None:
    [shown] = summarize([{"messages": CHAT}], tokenizer).rows
    assert text(shown.spans) == "<|user|>is it?<|end|>\n<|assistant|>yes and no<|end|>\n"
    assert text(shown.spans, learned=True) == "yes and no<|end|>\n"
    assert text(shown.spans, special=True) == "<|user|><|end|><|assistant|><|end|>"


def test_what_is_cut_shows_behind_what_is_read(tokenizer: Any) -> None:
    data = [{"prompt": "is it? ", "completion": "yes and no " * 9}]
    [shown] = summarize(data, tokenizer, max_length=12).rows
    [row] = prepare_data(data, tokenizer, max_length=12)
    assert text(shown.spans, cut=False) == tokenizer.decode(row["input_ids"])
    assert text(shown.spans) == "is it? " + "yes and no " * 9 + "<|end|>"
    assert shown.cut_count == len(tokenizer(text(shown.spans))["input_ids"]) - 12


def test_rows_that_are_cut_or_left_out_are_shown_wherever_they_are(tokenizer: Any) -> None:
    found = summarize(ROWS, tokenizer, max_length=16, rows=2)
    assert [row.number for row in found.rows][:2] == [0, 1]
    assert any(row.cut_count for row in found.rows) and any(row.missing for row in found.rows)
    assert "row 9: the completion is empty" in found.left_out


def test_lengths_are_those_of_the_rows_that_are_trained_on(tokenizer: Any) -> None:
    read = summarize(ROWS[:8], tokenizer)
    with_others = summarize([*ROWS[:8], {"prompt": "is it? " * 50, "completion": ""}], tokenizer)
    assert with_others.left_out_count == 1
    assert [getattr(with_others, name) for name in ("bins", "longest", "median")] == [
        read.bins,
        read.longest,
        read.median,
    ]
    nothing = summarize([{"prompt": "is it?", "completion": ""}], tokenizer)
    assert (nothing.row_count, nothing.bins[-1][2]) == (0, 1) and nothing.longest > 0


def test_a_rejected_completion_is_compared_and_not_learned() -> None:
    pair = {"prompt": "is it? ", "chosen": "yes", "rejected": "no, not"}
    inputs = ModelInputs(kind=PAIRS)
    found = summarize([pair, {**pair, "rejected": ""}], CharTokenizer(), inputs=inputs)
    [row, left_out] = found.rows
    assert (text(row.spans, learned=True)[:3], text(row.target, compared=True)[:7]) == ("yes", "no, not")
    assert not text(row.spans, compared=True) and not text(row.target, learned=True)
    [read] = prepare_data([pair], CharTokenizer(), inputs=inputs)
    learned, compared = (sum(label != -100 for label in read[name]) for name in ("labels", "rejected_labels"))
    assert (row.learned_count, row.compared_count) == (found.learned_count, found.compared_count) == (learned, compared)
    assert found.token_count == len(read["input_ids"]) + len(read["rejected_input_ids"])
    shown = (*left_out.spans, *left_out.target)
    assert left_out.missing and not any(span.learned or span.compared for span in shown)


def test_a_long_row_is_shown_in_part() -> None:
    [row] = summarize([{"text": "a" * 5000}], CharTokenizer(), max_length=3000).rows
    assert sum(span.skipped for span in row.spans) + len(text(row.spans, cut=False)) > 3000
    assert len(text(row.spans)) < 700 and text(row.spans, cut=True)
    assert row.token_count == 3000 and row.cut_count == 2001


def test_of_a_stream_the_first_rows_are_looked_at() -> None:
    import datasets

    def endless() -> Any:
        return ({"text": f"row {number}"} for number in itertools.count())

    found = summarize(datasets.IterableDataset.from_generator(endless), CharTokenizer())
    assert found.partial and found.row_count == 1000 and [row.number for row in found.rows] == [0, 1, 2]


def test_tokenised_rows_are_shown_with_or_without_a_tokenizer() -> None:
    data = [{"input_ids": [40, 41, 42], "labels": [-100, 41, 42]}, {"input_ids": [40], "attention_mask": [1]}]
    found = summarize(data, CharTokenizer())
    assert text(found.rows[0].spans, learned=True) == "IJ" and found.learned_count == 2 and found.limit is None
    assert text(summarize(data).rows[0].spans, learned=True) == "41 42 "


def test_a_space_between_shown_tokens_is_kept() -> None:
    class Words(CharTokenizer):
        def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False, **options: Any) -> str:
            return " ".join(["the", "cat", "sat"][token] for token in tokens)

    [row] = summarize([{"input_ids": [0, 1, 2], "labels": [-100, -100, 2]}], Words()).rows
    assert [span.text for span in row.spans] == ["the cat", " sat"]


def test_an_encoder_decoder_answers_apart(tokenizer: Any) -> None:
    data = [{"prompt": "the cat", "completion": "yes"}]
    apart = ModelInputs(encoder_decoder=True)
    [row] = summarize(data, tokenizer, inputs=apart).rows
    assert (text(row.spans), text(row.target), text(row.target, learned=True)) == ("the cat", "yes", "yes")
    assert row.learned_count == len(prepare_data(data, tokenizer, inputs=apart)[0]["labels"])


@pytest.mark.parametrize(("raw", "width"), [(0.7, 1), (1.0, 1), (1.2, 2), (4.4, 5), (5.5, 10), (23.0, 50)])
def test_bins_have_round_widths(raw: float, width: int) -> None:
    assert _round_width(raw) == width


@given(st.lists(st.integers(0, 5000), min_size=1), st.none() | st.integers(1, 3000))
@example(lengths=[5000], border=1)
def test_every_length_is_in_one_bin(lengths: list[int], border: int | None) -> None:
    bins = bins_of(lengths, border)
    assert all(one[1] + 1 == other[0] for one, other in itertools.pairwise(bins))
    assert sum(number for *_, number in bins) == len(lengths)
    assert all(number == sum(first <= length <= last for length in lengths) for first, last, number in bins)
    assert border is None or not any(first <= border < last for first, last, _ in bins)
    assert len(bins) <= 200
