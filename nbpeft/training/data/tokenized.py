"""Tokenizes rows of any form: all at once, or one by one as a stream yields them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from nbpeft.checkpoint import PromptFormat
from nbpeft.display.numbers import plural
from nbpeft.errors import TrainingError
from nbpeft.names import LOSS_WEIGHTS, REJECTED
from nbpeft.training.data.classes import Classes
from nbpeft.training.data.encoding import CodedRow, count_learned
from nbpeft.training.data.forms import FOR_CLASSIFIERS, TOKENISED, row_of
from nbpeft.training.data.left_out import COLUMNS, UnusedParts, kind_of, line_of, named_rows
from nbpeft.training.data.prompt_formats import SeenFormats
from nbpeft.training.data.reading import (
    LABELS,
    MASKS,
    ModelInputs,
    Reading,
    as_list,
    columns_of,
    reading,
    renamed,
)
from nbpeft.training.data.row import WEIGHT
from nbpeft.training.data.row_coder import coded_rows
from nbpeft.training.data.sources import is_stream, open_data

_READ_THROUGH = 10_000
"""The greatest number of rows to read for their columns from a dataset of unknown type, where reading may be slow."""
_REWRITTEN = (WEIGHT, LOSS_WEIGHTS, *MASKS)
"""Columns of tokenized rows that are applied to the labels and their weights."""


class TokenizedRows(Dataset[dict[str, Any]]):
    """Tokenized rows in memory.

    Attributes:
        truncated: Number of rows that were truncated to ``max_length``.
        split: Number of rows that were split, and number of their parts.
        left_out: (number, reason) of each row with nothing to train on.
        unused: Parts of the rows that are not trained on, one line for each reason.
        format: The form in which the rows are written; None if they were given as tokens.
        numbers: The number of each row in the data; None if they are the rows as they were given.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        truncated: int = 0,
        left_out: Sequence[tuple[int, str]] = (),
        unused: Sequence[str] = (),
        format: PromptFormat | None = None,
        numbers: Sequence[int] | None = None,
        split: tuple[int, int] = (0, 0),
    ) -> None:
        self._rows = rows
        self.split = split
        self.truncated = truncated
        self.left_out = tuple(left_out)
        self.unused = tuple(unused)
        self.format = format
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    @property
    def dropped(self) -> int:
        """The number of rows left out because there was nothing to train on."""
        return len(self.left_out)

    @property
    def token_count(self) -> int:
        """The number of tokens of all rows together."""
        return sum(len(row.get(name, ())) for row in self._rows for name in ("input_ids", f"{REJECTED}input_ids"))

    @property
    def notes(self) -> str:
        """A line about what was truncated, left out or not used; empty if nothing was."""
        parts = []
        if self.truncated:
            parts.append(f"{self.truncated} of {len(self) + self.dropped} rows were truncated to the maximum length")
        if self.split[0]:
            parts.append(split_line(*self.split))
        if self.left_out:
            parts.append(f"{plural(self.dropped, 'row')} left out: {named_rows(self.left_out)}")
        return "; ".join([*parts, *self.unused])

    def select(self, indices: Iterable[int]) -> TokenizedRows:
        """The rows with these indices."""
        chosen = list(indices)
        numbers = None if self.numbers is None else [self.numbers[index] for index in chosen]
        return TokenizedRows([self._rows[index] for index in chosen], format=self.format, numbers=numbers)

    def noting(self, *lines: str) -> TokenizedRows:
        """The same rows with other notes."""
        return TokenizedRows(self._rows, unused=lines, format=self.format, numbers=self.numbers)


def split_line(rows: int, parts: int) -> str:
    """A line about rows that were too long and were split."""
    return f"{plural(rows, 'row')} longer than the maximum length split into {parts:,} parts"


class StreamedRows(IterableDataset[dict[str, Any]]):
    """Rows that are tokenized as a stream yields them, in its order; an invalid row raises when it is read.

    Args:
        coded: starts the stream from its first row.
        check: called with each row and its number.
        skipped: number of trainable rows at the start to skip, which are evaluation rows.
        unused: the counts of unused parts so far.
        formats: the forms of the rows read so far.
        left_out: what is wrong with rows that are left out -> a line about the first such row.

    Attributes:
        report: called with a line about a part of rows that is not trained on, once for each such part, and about the
            first of the rows that are left out for the same reason.
    """

    def __init__(
        self,
        coded: Callable[[], Iterator[CodedRow]],
        check: Callable[[Mapping[str, Any], int], None] = lambda row, number: None,
        skipped: int = 0,
        unused: UnusedParts | None = None,
        formats: SeenFormats | None = None,
        left_out: dict[str, str] | None = None,
    ) -> None:
        self._coded = coded
        self.check = check
        self.skipped = skipped
        self.report: Callable[[str], None] = lambda line: None
        self._unused = unused or UnusedParts()
        self._formats = formats or SeenFormats()
        self._left_out = {} if left_out is None else left_out

    def __iter__(self) -> Iterator[dict[str, Any]]:
        passed = 0
        for coded in self._coded():
            for part in self._unused.add(coded.unused):
                self.report(line_of(part))
            if coded.missing:
                kind = kind_of(coded.missing)
                if kind not in self._left_out:
                    self._left_out[kind] = f"rows left out, first row {coded.number}: {coded.missing}"
                    self.report(self._left_out[kind])
                continue
            self._formats.add(coded)
            passed += 1
            if passed > self.skipped:
                row = coded.row
                self.check(row, coded.number)
                yield row

    @property
    def notes(self) -> str:
        """A line about the form, and the unused parts, of the first row and of the rows read so far."""
        for coded in self._coded():
            self._unused.add(coded.unused)
            if self._formats.format is None and not coded.missing:
                self._formats.add(coded)
            break
        return "; ".join((*self._left_out.values(), *self._unused.lines(), *self._formats.lines()))

    @property
    def format(self) -> PromptFormat | None:
        """The form of the first row, and of the rows read so far; None for rows that were given as tokens."""
        if self._formats.format is None:
            for coded in self._coded():
                if not coded.missing:
                    self._formats.add(coded)
                    break
        return self._formats.format

    def after(self, count: int) -> StreamedRows:
        """The same stream without its first ``count`` trainable rows."""
        return StreamedRows(self._coded, self.check, self.skipped + count, self._unused, self._formats, self._left_out)


@dataclass(frozen=True)
class PreparedRows:
    """Rows for a Trainer.

    Attributes:
        rows: the tokenized rows.
        notes: a line about what was truncated, left out or not used; empty if nothing was.
        classes: the classes of a classifier, with the names that its model or the rows give them.
    """

    rows: Any
    notes: str = ""
    classes: Classes | None = None


def prepare_data(
    data: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    inputs: ModelInputs | None = None,
    separator: str | None = None,
    skip_bad: bool = False,
    **how: Any,
) -> Any:
    """Prepares rows for a Trainer.

    Args:
        data: Rows, or their source; see :func:`open_data`. Rows with ``input_ids`` are passed on as
            they are; a stream is tokenized as it is read.
        tokenizer: The tokenizer; required for all other rows.
        max_length: The greatest number of tokens of a row, the rest is cut off; by default the tokenizer's limit, at
            most 1024.
        columns: Name -> the column in the data: ``{"prompt": "question", "completion": "answer"}``.
        inputs: The inputs of the model; by default those of a decoder.
        separator: What separates the cells of a ``.csv`` or ``.tsv`` file; by default it is detected.
        skip_bad: Leave out rows that cannot be read.
        **how: ``learn``, ``reasoning``, ``long`` and ``chat_template_kwargs``, as for :func:`nbpeft.train`.

    Returns:
        A dataset of tokenized rows, for ``Trainer(train_dataset=…)``.

    Raises:
        ConfigError: an option is invalid, or has no effect on these rows.
        TrainingError: the data has no known form, or a row cannot be read; the message names its columns, or the row.
    """
    opened = open_data(data, separator, skip_bad=skip_bad)
    options = {"max_length": max_length, "columns": columns, "inputs": inputs, "skip_bad": skip_bad, **how}
    return prepared(opened, tokenizer, **options).rows


def prepared(rows: Any, tokenizer: Any = None, **options: Any) -> PreparedRows:
    """As :func:`prepare_data` of opened rows, with what a person should know of it."""
    reader = reading(rows, tokenizer, **options)
    if reader.form is None:
        return _tokens(reader)
    if is_stream(reader.rows):
        streamed = StreamedRows(
            functools.partial(coded_rows, reader),
            formats=SeenFormats(reader.options, reader.for_template, reader.limit),
        )
        return PreparedRows(streamed, streamed.notes, reader.inputs.classes)
    tokenized = _in_memory(reader)
    return PreparedRows(tokenized, tokenized.notes, reader.inputs.classes)


def lines_of(reader: Reading, unused: UnusedParts, formats: SeenFormats, count: int) -> tuple[str, ...]:
    """Lines about where rows come from, and about what is not trained on, one for each reason.

    Args:
        reader: how the rows are read.
        unused: the parts of the rows that are not trained on.
        formats: the forms of the rows.
        count: the number of rows.
    """
    mixed = filter(None, (getattr(reader.rows, "note", ""), reader.note))
    return (*mixed, *unused.lines(count), *reader.options.lines(unused), *formats.lines())


def _in_memory(reader: Reading) -> TokenizedRows:
    """Tokenizes all rows."""
    rows: list[dict[str, Any]] = []
    left_out: list[tuple[int, str]] = []
    unused, formats, truncated = UnusedParts(), SeenFormats(reader.options, reader.for_template, reader.limit), 0
    numbers: list[int] = []
    split_rows = split_parts = 0
    for coded in coded_rows(reader):
        truncated += coded.cut
        split_rows += coded.part_count > 1 and not coded.part
        split_parts += coded.part_count > 1
        unused.add(coded.unused)
        if coded.missing:
            left_out.append((coded.number, coded.missing))
            continue
        formats.add(coded)
        rows.append(coded.row)
        numbers.append(coded.number)
    if not rows:
        raise TrainingError(
            f"None of the {len(left_out)} rows has anything to learn within {reader.limit} tokens: "
            f"{named_rows(left_out)}.",
            dropped=len(left_out),
        )
    count = len(rows) + len(left_out) - split_parts + split_rows
    lines = lines_of(reader, unused, formats, count)
    split = split_rows, split_parts
    found = TokenizedRows(rows, truncated=truncated, left_out=left_out, unused=lines, numbers=numbers, split=split)
    classes = reader.inputs.classes
    if reader.form not in (None, *FOR_CLASSIFIERS):
        found.format = formats.format
    elif classes is not None and classes.by_number:
        found.format = PromptFormat(chat=False, classes=classes.by_number)
    return found


def _tokens(reader: Reading) -> PreparedRows:
    """Tokenized rows without their unused columns, and with their masks and weights applied to the labels."""
    rows = reader.rows
    if isinstance(rows, TokenizedRows):
        return PreparedRows(rows, rows.notes)
    available, listed = check_columns(reader), isinstance(rows, (list, tuple))
    if any(reader.columns.get(name, name) in available for name in _REWRITTEN):
        read = StreamedRows(functools.partial(coded_rows, reader)) if is_stream(rows) else _in_memory(reader)
        return PreparedRows(read, read.notes)
    extra = reader.extra(available)
    unused = UnusedParts()
    unused.add((COLUMNS, repr(name)) for name in extra if name != reader.group)
    left_out = _unlearned(reader, available)
    numbers = sorted({*range(len(rows))} - {number for number, _ in left_out}) if left_out else None
    facts: dict[str, Any] = {"left_out": left_out, "unused": unused.lines(), "numbers": numbers}
    notes = TokenizedRows((), **facts).notes
    if numbers is not None:
        rows = [rows[number] for number in numbers] if listed else rows.select(numbers)
    if not listed:
        if extra and hasattr(rows, "remove_columns"):
            rows = rows.remove_columns(extra)
        if reader.columns:
            rows = _renamed_rows(rows, reader.columns)
        return PreparedRows(rows if numbers is None else TokenizedRows(rows, **facts), notes)
    if extra or reader.columns:
        left = {*extra, *reader.columns.values()} - reader.columns.keys()
        rows = [{name: item for name, item in renamed(row, reader.columns).items() if name not in left} for row in rows]
    return PreparedRows(TokenizedRows(rows, **facts), notes)


def _unlearned(reader: Reading, columns: Sequence[str]) -> list[tuple[int, str]]:
    """The tokenized rows that have labels of which none is learned; of a large dataset, the first ones only.

    If there are no others, ``check_rows`` refuses them.
    """
    rows, inputs = reader.rows, reader.inputs
    name = next((name for name in LABELS if reader.columns.get(name, name) in columns), None)
    known = isinstance(rows, (list, tuple)) or (hasattr(rows, "select") and not is_stream(rows))
    if name is None or inputs.has_class or not known:
        return []
    column, own = reader.columns.get(name, name), inputs.encoder_decoder or inputs.classes is not None
    tokens, found = reader.columns.get(TOKENISED, TOKENISED), list[tuple[int, str]]()
    for number in range(min(len(rows), _READ_THROUGH)):
        row = rows[number]
        ids, labels = as_list(row.get(tokens)), as_list(row.get(column))
        fits = len(labels) == len(ids) or inputs.encoder_decoder  # other rows are refused
        if labels and fits and not count_learned(labels, own):
            found.append((number, "nothing to learn"))
    return found if len(found) < len(rows) else []


def _columns_of_all(rows: Any) -> tuple[str, ...]:
    """The columns of all rows; only those of the first row for a stream, or for many rows of an unknown type."""
    many = is_stream(rows) or (not isinstance(rows, (list, tuple)) and len(rows) > _READ_THROUGH)
    if many or hasattr(rows, "column_names"):
        return columns_of(rows)
    each = (row_of(rows[number], number, {}).values for number in range(len(rows)))
    return tuple(dict.fromkeys(str(name) for values in each for name in values))


def check_columns(reader: Reading) -> tuple[str, ...]:
    """Refuses a list of tokenized rows of which some lack a column that others have; returns the columns of all rows.

    Raises:
        TrainingError: a row lacks a column; names the row.
    """
    available = _columns_of_all(reader.rows)
    if not isinstance(reader.rows, (list, tuple)):
        return available
    used = [name for name in available if name not in reader.extra(available)]
    optional = {reader.columns.get(name, name) for name in ("attention_mask", *LABELS, *_REWRITTEN)}
    for number, row in enumerate(reader.rows):
        missing = next((name for name in used if name not in row and name not in optional), None)
        if missing is not None:
            raise TrainingError(f"Row {number} has no {missing!r}, which other rows have.", index=number)
    return available


def _renamed_rows(rows: Any, columns: Mapping[str, str]) -> Any:
    if is_stream(rows) or hasattr(rows, "rename_columns"):
        return rows.rename_columns({column: name for name, column in columns.items()})
    return TokenizedRows([renamed(row, columns) for row in rows])
