"""Rows as a model reads them, and the lengths of all rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nbpeft._util.mixtures import Mixture
from nbpeft.checkpoint import PromptFormat
from nbpeft.display.blocks import TokenSpan
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.names import DEFAULT_SEED, IGNORED_LABEL
from nbpeft.training.data.answers import AnswerCounts, Answers
from nbpeft.training.data.encoding import CodedRow, decoded
from nbpeft.training.data.forms import COMPARED, FOR_CLASSIFIERS, TEXT
from nbpeft.training.data.left_out import COLUMNS, UnusedParts, named_rows
from nbpeft.training.data.prompt_formats import SeenFormats
from nbpeft.training.data.reading import ModelInputs, Reading, columns_of, reading
from nbpeft.training.data.row import LABEL
from nbpeft.training.data.row_coder import coded_rows
from nbpeft.training.data.sources import is_stream, open_data
from nbpeft.training.data.split import grouping, hash_of
from nbpeft.training.data.tokenized import check_columns, lines_of

_STREAMED = 1000
"""The number of rows of a stream that are read."""
_BINS = 24
_SHOWN_TOKENS = (40, 400)
"""The least and greatest number of tokens shown of one row; of a longer row its beginning and the part around the
truncation."""
_ALL_SHOWN_TOKENS = 4000
_EXTRA = 2
_LABEL_TOKENS = 24
"""The greatest number of tokens of an answer that is counted as a label."""
_HAS_LABEL = (COLUMNS, repr(LABEL))


@dataclass(frozen=True)
class RowSummary:
    """The summary of one row.

    Attributes:
        number: 0 for the first.
        token_count: tokens after truncation.
        learned_count: labels that count in the loss, without those of a rejected completion.
        cut_count: tokens beyond the maximum length.
        missing: why there is nothing to train on; empty if there is something.
        spans: its tokens as text.
        target: the decoder's tokens as text, for an encoder-decoder model, or those with the rejected completion.
        target_title: what the target is.
        label: the label for a classifier, as text; empty if the row's tokens are the labels.
        part: which part of a row that was split it is, as text; empty for a whole row.
        compared_count: labels of the rejected completion.
    """

    number: int
    token_count: int
    learned_count: int
    cut_count: int
    missing: str
    spans: tuple[TokenSpan, ...]
    target: tuple[TokenSpan, ...] = ()
    label: str = ""
    target_title: str = "to be answered"
    part: str = ""
    compared_count: int = 0


@dataclass(frozen=True)
class DataSummary:
    """The summary of the data of a training.

    Attributes:
        form: the form of the rows.
        row_count: rows to train on.
        token_count: tokens of these rows, after truncation.
        learned_count: labels of these rows that count in the loss, without those of rejected completions.
        cut_rows: rows longer than the maximum length.
        cut_tokens: tokens beyond it.
        split_rows: rows that were split because they are longer.
        split_parts: number of their parts, which count as rows to train on.
        left_out: rows with nothing to train on, by number and reason, as text.
        left_out_count: number of these rows.
        longest: tokens of the longest of these rows, before truncation; of all rows if there is none to train on.
        median: median number of tokens of these rows, before truncation.
        limit: the maximum length in tokens; None for tokenized rows, which are not truncated.
        bins: (first length, last length, number of rows) of each bin of the histogram of the lengths of these rows.
        rows: summaries of some of the rows.
        partial: whether only the first rows of a stream were read.
        unused: parts of the rows that are not trained on, one line for each reason.
        has_labels: whether the labels are one class or number for each row, for a classifier.
        unlabelled: the column with the text of rows whose label is not used; empty for other rows.
        format: the form in which the rows are written; None if they are tokenized or for a classifier.
        repeated: rows to train on that are equal to an earlier one.
        grouping: what keeps equal rows together when rows are held out, as a line.
        for_template: columns with which the chat template would be applied, if the tokenizer has one and it is not.
        compared_count: labels of the rejected completions of these rows.
        answers: the distinct answers, or labels of a classifier, with their numbers of rows, if they are few.
    """

    form: str
    row_count: int
    token_count: int
    learned_count: int
    cut_rows: int
    cut_tokens: int
    left_out: str
    left_out_count: int
    longest: int
    median: int
    limit: int | None
    bins: tuple[tuple[int, int, int], ...]
    rows: tuple[RowSummary, ...]
    partial: bool = False
    unused: tuple[str, ...] = ()
    has_labels: bool = False
    unlabelled: str = ""
    format: PromptFormat | None = None
    for_template: Mapping[str, str] = field(default_factory=dict)
    split_rows: int = 0
    split_parts: int = 0
    repeated: int = 0
    grouping: str = ""
    compared_count: int = 0
    answers: Answers = ()


class _Totals:
    """Totals over rows for ``DataSummary``, and the rows to show; lengths are before truncation.

    Args:
        reader: reads the rows.
        row_count: the number of rows to show, besides those that are truncated or left out.
    """

    def __init__(self, reader: Reading, row_count: int) -> None:
        self.unused, self.formats = UnusedParts(), SeenFormats(reader.options, reader.for_template, reader.limit)
        self.answers = AnswerCounts()
        self.shown_rows: list[CodedRow] = []
        self._reader = reader
        self._row_count = row_count
        self.lengths: list[int] = []
        self.kept_lengths: list[int] = []
        self.left_out: list[tuple[int, str]] = []
        self.hashes: set[int] = set()
        self.repeated = 0
        self.bare = False
        self.tokens = self.learned = self.compared = 0
        self.cut_rows = self.cut_tokens = self.split_rows = self.split_parts = 0

    def add(self, row: CodedRow) -> None:
        """Adds a row, or a part of a row that was split."""
        length = _length(row)
        self.lengths.append(length)
        self.unused.add(row.unused)
        further = self.shown_rows[self._row_count :]
        if len(self.lengths) <= self._row_count or (len(further) < _EXTRA and _is_first_of_its_kind(row, further)):
            self.shown_rows.append(row)
        self.cut_rows += row.cut
        self.cut_tokens += max(0, length - row.limit) if row.cut else 0
        self.split_rows += row.part_count > 1 and not row.part
        self.split_parts += row.part_count > 1
        if row.missing:
            self.left_out.append((row.number, row.missing))
            return
        self.formats.add(row)
        self.answers.add(_answer(row, self._reader))
        hashed = hash_of(row.row)
        self.repeated += hashed in self.hashes
        self.hashes.add(hashed)
        self.kept_lengths.append(length)
        self.learned += row.learned_count
        self.bare |= row.inputs is not None
        self.tokens += len(row.row.get("input_ids", ()))
        if row.rejected is not None:
            self.compared += row.rejected.learned_count
            self.tokens += len(row.rejected.row["input_ids"])


def summarize(
    data: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    inputs: ModelInputs | None = None,
    rows: int = 3,
    separator: str | None = None,
    skip_bad: bool = False,
    seed: int | None = None,
    **how: Any,
) -> DataSummary:
    """Summarizes all rows, read by the same code as in training; of a stream the first 1,000.

    Args:
        data: as for ``prepare_data``.
        tokenizer: as for ``prepare_data``; without one, tokenized rows are shown as token ids.
        max_length: as for ``prepare_data``.
        columns: as for ``prepare_data``.
        inputs: as for ``prepare_data``.
        rows: the number of rows to show; up to two rows that are truncated or left out follow them.
        separator: as for ``prepare_data``.
        skip_bad: as for ``prepare_data``.
        seed: seed of the training, with which the rows of a mixture are drawn; None for the default one.
        **how: as for ``prepare_data``.

    Raises:
        ConfigError: as for ``prepare_data``; or a seed is given, and the rows are not drawn.
        TrainingError: as for ``prepare_data``, except that rows with nothing to train on are only reported.
    """
    if seed is not None and not isinstance(data, Mixture):
        raise ConfigError("seed has no effect: only the rows of a mixture are drawn", field="seed")
    opened = open_data(data, separator, skip_bad=skip_bad, seed=DEFAULT_SEED if seed is None else seed)
    how |= {"max_length": max_length, "columns": columns, "inputs": inputs, "skip_bad": skip_bad}
    reader = reading(opened, tokenizer, **how)
    if reader.form is None:
        check_columns(reader)
    streamed = is_stream(reader.rows)
    coded: Iterator[CodedRow] = itertools.islice(coded_rows(reader), _STREAMED if streamed else None)
    totals = _Totals(reader, rows)
    for row in coded:
        totals.add(row)
    lengths, parts, shown_rows = totals.lengths, totals.split_parts, totals.shown_rows
    unused, formats = totals.unused, totals.formats
    if not lengths:
        raise TrainingError("The stream has no rows.")
    least, most = _SHOWN_TOKENS
    shown = max(least, min(most, _ALL_SHOWN_TOKENS // max(1, len(shown_rows))))
    kept = totals.kept_lengths or lengths
    return DataSummary(
        form=reader.form.name if reader.form is not None else "inputs of the model" if totals.bare else "tokenized",
        row_count=len(lengths) - len(totals.left_out),
        token_count=totals.tokens,
        learned_count=totals.learned,
        cut_rows=totals.cut_rows,
        cut_tokens=totals.cut_tokens,
        left_out=named_rows(totals.left_out),
        left_out_count=len(totals.left_out),
        longest=max(kept),
        median=round(statistics.median(kept)),
        limit=reader.limit if reader.form is not None else None,
        bins=bins_of(kept, reader.limit if totals.cut_rows else None),
        rows=tuple(_summary(row, reader, shown) for row in shown_rows),
        partial=streamed and len(lengths) == _STREAMED,
        unused=lines_of(reader, unused, formats, len(lengths) - parts + totals.split_rows),
        split_rows=totals.split_rows,
        split_parts=parts,
        has_labels=reader.inputs.has_class and reader.form is not COMPARED,
        unlabelled=reader.columns.get("text", "text") if reader.form is TEXT and _HAS_LABEL in unused else "",
        format=formats.format if reader.form not in (None, *FOR_CLASSIFIERS) else None,
        repeated=totals.repeated,
        compared_count=totals.compared,
        answers=totals.answers.few,
        grouping=grouping(() if streamed else columns_of(reader.rows), reader.columns) if totals.repeated else "",
        for_template=_for_template(reader, formats.format),
    )


def _answer(row: CodedRow, reader: Reading) -> str | None:
    """The answer that a row ends with, or its label; None if it is longer than a label, or a text alone."""
    classes, labels = reader.inputs.classes, row.whole.labels
    if classes is not None and row.label is not None:
        return classes.name(row.label)
    if row.own_labels or row.rejected is not None or reader.form is TEXT or not hasattr(reader.tokenizer, "decode"):
        return None
    learned = [place for place, label in enumerate(labels) if label != IGNORED_LABEL]
    last = learned[-1] + 1 if learned else 0
    first = next((place for place in reversed(range(last)) if labels[place] == IGNORED_LABEL), -1) + 1
    if not 0 < last - first <= _LABEL_TOKENS:
        return None
    return decoded(reader.tokenizer, () if row.encoder_decoder else row.whole.input_ids[:first], labels[first:last])


def _for_template(reader: Reading, form: PromptFormat | None) -> dict[str, str]:
    """The columns with which the chat template would be applied to prompts and completions that are plain text."""
    return reader.for_template if form is not None and not form.chat else {}


def bins_of(lengths: Sequence[int], border: int | None = None) -> tuple[tuple[int, int, int], ...]:
    """A histogram of lengths.

    Args:
        lengths: the lengths, in tokens.
        border: a length at which a bin ends, so that no bin has lengths on both sides of it.

    Returns:
        First length, last length and number of rows of each bin.
    """
    longest = max(lengths)
    width = _round_width(max(longest / _BINS, 1))
    if border is not None and border > width:  # a width of which the border is about a multiple
        width = math.ceil(border / round(border / width))
    counts = Counter(_bin(length, width, border) for length in lengths)
    edges = [_bin(0, width, border)]
    while edges[-1][1] < longest:
        edges.append(_bin(edges[-1][1] + 1, width, border))
    return tuple((*edge, counts[edge]) for edge in edges)


def _bin(length: int, width: int, border: int | None) -> tuple[int, int]:
    """The bin of a length; bins begin at 1, 1 + width, …, and the first one includes 0."""
    if border is not None and length > border:
        place = (length - border - 1) // width
        return border + 1 + place * width, border + (place + 1) * width
    place = max(0, length - 1) // width
    last = (place + 1) * width
    return (1 + place * width if place else 0), (min(last, border) if border is not None else last)


def _round_width(raw: float) -> int:
    unit = 10 ** math.floor(math.log10(raw))
    return int(next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * (1 - 1e-9)))


def _length(row: CodedRow) -> int:
    other = 0 if row.rejected is None else len(row.rejected.whole.input_ids)
    return max(len(row.whole.input_ids), len(row.whole.labels) if row.encoder_decoder else 0, other)


def _is_first_of_its_kind(row: CodedRow, shown: Iterable[CodedRow]) -> bool:
    """Whether a row is truncated or left out, and none of the rows shown is like it in both respects."""
    return (row.cut or bool(row.missing)) and all(
        (bool(row.missing), row.cut) != (bool(other.missing), other.cut) for other in shown
    )


def _summary(row: CodedRow, reader: Reading, shown: int) -> RowSummary:
    if row.rejected is not None:
        pair = (replace(row, rejected=None), row.rejected)
        chosen, rejected = (_summary(replace(part, reason=row.missing), reader, shown) for part in pair)
        target = tuple(replace(item, learned=False, compared=item.learned) for item in rejected.spans)
        return replace(
            chosen,
            cut_count=chosen.cut_count + rejected.cut_count,
            target=target,
            target_title="rejected",
            compared_count=rejected.learned_count,
        )
    if row.inputs is not None:
        text = ", ".join(f"{name}: {_described(value)}" for name, value in row.inputs.items())
        return RowSummary(row.number, 0, 0, 0, "", (TokenSpan(text),))
    tokenizer, classes = reader.tokenizer, reader.inputs.classes
    learned = [label != IGNORED_LABEL and not row.missing for label in row.whole.labels]
    title = RowSummary.target_title
    if row.encoder_decoder:
        spans = _spans_of(tokenizer, row.whole.input_ids, [False] * len(row.whole.input_ids), row.limit, shown)
        target = _spans_of(tokenizer, row.whole.labels, learned, row.limit, shown)
    else:
        learned = [False, *learned[1:]] if learned and not row.own_labels else learned
        learned += [False] * (len(row.whole.input_ids) - len(learned))
        spans, target = _spans_of(tokenizer, row.whole.input_ids, learned, row.limit, shown), ()
        if row.own_labels and not row.missing:
            target, title = _tags(row, reader, shown), "tags"
    return RowSummary(
        row.number,
        min(len(row.whole.input_ids), row.limit),
        row.learned_count,
        max(0, _length(row) - row.limit) if row.cut else 0,
        row.missing,
        spans,
        target,
        "" if classes is None or row.label is None else classes.name(row.label),
        title,
        part=f"part {row.part + 1} of {row.part_count}" if row.part_count > 1 else "",
    )


def _described(value: Any) -> str:
    """A number or text as it is, and an array by its dtype and shape."""
    values = value if hasattr(value, "dtype") else np.asarray(value)
    dtype = str(values.dtype).removeprefix("torch.")
    return f"{dtype} {' × '.join(map(str, values.shape))}" if values.shape else f"{value}"


def _tags(row: CodedRow, reader: Reading, most: int) -> tuple[TokenSpan, ...]:
    """The first learned tokens of a row, with the tag of each."""
    classes, read = reader.inputs.classes, row.row
    assert classes is not None
    places = [place for place, label in enumerate(read["labels"]) if label != IGNORED_LABEL]
    parts = [
        f"{_text(reader.tokenizer, read['input_ids'], place, place + 1, False).strip()}: "
        f"{classes.name(read['labels'][place])}"
        for place in places[:most]
    ]
    skipped = (TokenSpan("", skipped=len(places) - most),) if len(places) > most else ()
    return (TokenSpan(", ".join(parts), learned=True), *skipped)


def _spans_of(
    tokenizer: Any, ids: Sequence[int], learned: Sequence[bool], limit: int, most: int
) -> tuple[TokenSpan, ...]:
    """Tokens as text: adjacent tokens of one kind in one span, each special token in its own."""
    special = _special_ids(tokenizer)
    kinds = [(learned[place], token in special, place >= limit) for place, token in enumerate(ids)]
    borders = [0] + [place for place in range(1, len(ids)) if kinds[place] != kinds[place - 1] or kinds[place][1]]
    spans: list[TokenSpan] = []
    shown = 0
    for start, stop in _shown(len(ids), limit, most):
        if start > shown:
            spans.append(TokenSpan("", skipped=start - shown))
        inside = [border for border in borders if start < border < stop]
        for first, last in itertools.pairwise([start, *inside, stop]):
            learns, is_special, cut = kinds[first]
            spans.append(TokenSpan(_text(tokenizer, ids, first, last, is_special), learns, is_special, cut))
        shown = stop
    return (*spans, TokenSpan("", skipped=len(ids) - shown)) if shown < len(ids) else tuple(spans)


def _shown(length: int, limit: int, most: int) -> list[tuple[int, int]]:
    """The ranges of tokens shown: of a long row its two ends, and the start of the truncated part."""
    half, end = most // 2, min(limit, length)
    read = [(0, end)] if end <= 2 * half else [(0, half), (end - half, end)]
    return [part for part in (*read, (end, min(length, end + half // 2))) if part[0] < part[1]]


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {token for token, token_info in added.items() if getattr(token_info, "special", False)}
    return {*getattr(tokenizer, "all_special_ids", ()), *marked}


def _text(tokenizer: Any, ids: Sequence[int], first: int, last: int, special: bool) -> str:
    """The text of some of a row's tokens; special tokens and unprintable ones by their names or numbers."""
    if not hasattr(tokenizer, "decode"):
        return " ".join(str(token) for token in ids[first:last]) + " "
    if special and hasattr(tokenizer, "convert_ids_to_tokens"):
        return str(tokenizer.convert_ids_to_tokens(int(ids[first])))
    before, tokens = ids[:first], ids[first:last]
    text = decoded(tokenizer, before, tokens, special=True) or decoded(tokenizer, (), tokens, special=True)
    return text or "".join(f"<{token}>" for token in tokens)
