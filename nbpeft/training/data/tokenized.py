"""Rows of any form become tokens: all at once, or as a stream gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from nbpeft.display.numbers import plural
from nbpeft.errors import TrainingError, few
from nbpeft.names import LOSS_WEIGHTS
from nbpeft.training.data.forms import row_of
from nbpeft.training.data.reading import (
    LABELS,
    MASKS,
    CodedRow,
    ModelInputs,
    Reading,
    columns_of,
    reading,
    renamed,
)
from nbpeft.training.data.row import WEIGHT
from nbpeft.training.data.sources import is_stream, open_data
from nbpeft.training.data.unused import COLUMNS, UnusedParts, line_of

_NAMED = 5
"""Rows left out that a note names."""
_READ_THROUGH = 10_000
"""Rows of a dataset of unknown kind that are read for their columns, which may cost anything."""
_REWRITTEN = (WEIGHT, LOSS_WEIGHTS, *MASKS)
"""Columns of tokenised rows that become labels and their weights."""


class TokenizedRows(Dataset[dict[str, Any]]):
    """Tokenised rows in memory.

    Attributes:
        truncated: Rows that were cut to ``max_length``.
        left_out: Number of each row left out because nothing in it could be learned, and why.
        unused: What the rows held that is not trained on, a line for each reason.
        token_count: Tokens of all rows.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        truncated: int = 0,
        left_out: Sequence[tuple[int, str]] = (),
        unused: Sequence[str] = (),
    ) -> None:
        self._rows = rows
        self.truncated = truncated
        self.left_out = tuple(left_out)
        self.unused = tuple(unused)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    @property
    def dropped(self) -> int:
        """Rows left out because nothing in them could be learned."""
        return len(self.left_out)

    @property
    def token_count(self) -> int:
        """Tokens of all rows together."""
        return sum(len(row["input_ids"]) for row in self._rows)

    @property
    def notes(self) -> str:
        """What was cut, left out or not used, in one line; empty if nothing was."""
        parts = []
        if self.truncated:
            parts.append(f"{self.truncated} of {len(self) + self.dropped} rows were cut to the maximal length")
        if self.left_out:
            parts.append(f"{plural(self.dropped, 'row')} left out: {named_rows(self.left_out)}")
        return "; ".join([*parts, *self.unused])

    def select(self, indices: Iterable[int]) -> TokenizedRows:
        """Some of the rows."""
        return TokenizedRows([self._rows[index] for index in indices])

    def noting(self, *lines: str) -> TokenizedRows:
        """The same rows with other notes."""
        return TokenizedRows(self._rows, unused=lines)


class StreamedRows(IterableDataset[dict[str, Any]]):
    """Rows that are tokenised as a stream gives them, in its order; a bad one raises when it comes.

    Args:
        coded: starts the stream anew.
        check: called with each row and its number.
        skipped: rows with something to learn that are left to others.
        unused: what is known of the stream that is not trained on.

    Attributes:
        report: called with what rows hold that is not trained on, once for each of it.
    """

    def __init__(
        self,
        coded: Callable[[], Iterator[CodedRow]],
        check: Callable[[Mapping[str, Any], int], None] = lambda row, number: None,
        skipped: int = 0,
        unused: UnusedParts | None = None,
    ) -> None:
        self._coded = coded
        self.check = check
        self.skipped = skipped
        self.report: Callable[[str], None] = lambda line: None
        self._unused = unused or UnusedParts()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        passed = 0
        for coded in self._coded():
            for part in self._unused.add(coded.unused):
                self.report(line_of(part))
            if coded.missing:
                continue
            passed += 1
            if passed > self.skipped:
                row = coded.row
                self.check(row, coded.number)
                yield row

    @property
    def notes(self) -> str:
        """What the rows until now held that is not trained on, and the first of them, in one line."""
        for coded in self._coded():
            self._unused.add(coded.unused)
            break
        return "; ".join(self._unused.lines())

    def after(self, count: int) -> StreamedRows:
        """The same stream without its first rows."""
        return StreamedRows(self._coded, self.check, self.skipped + count, self._unused)


@dataclass(frozen=True)
class PreparedRows:
    """Rows as a Trainer is given them.

    Attributes:
        rows: of tokens.
        notes: what was cut, left out or not used, in one line; empty if nothing was.
    """

    rows: Any
    notes: str = ""


def prepare_data(
    data: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    inputs: ModelInputs | None = None,
) -> Any:
    """Turns rows into something a Trainer can be given.

    Args:
        data: Rows, or where they are; see :func:`open_data`. Rows that have ``input_ids`` are handed on as
            they are; a stream is tokenised as it comes.
        tokenizer: Needed for all other rows.
        max_length: Tokens a row is cut to; by default what the tokenizer allows, at most 1024.
        columns: What the columns are called: ``{"prompt": "question", "completion": "answer"}``.
        inputs: What the model takes of them; by default what a decoder does.

    Raises:
        TrainingError: the data has another form; the message names what was found.
    """
    return prepared(open_data(data), tokenizer, max_length=max_length, columns=columns, inputs=inputs).rows


def prepared(rows: Any, tokenizer: Any = None, **options: Any) -> PreparedRows:
    """As :func:`prepare_data` of opened rows, with what a person should know of it."""
    how = reading(rows, tokenizer, **options)
    if how.form is None:
        return _tokens(how)
    if is_stream(how.rows):
        streamed = StreamedRows(how.coded)
        return PreparedRows(streamed, streamed.notes)
    tokenized = _in_memory(how)
    return PreparedRows(tokenized, tokenized.notes)


def _in_memory(how: Reading) -> TokenizedRows:
    """All rows, tokenised."""
    rows: list[dict[str, Any]] = []
    left_out: list[tuple[int, str]] = []
    unused, truncated = UnusedParts(), 0
    for coded in how.coded():
        truncated += coded.cut
        unused.add(coded.unused)
        if coded.missing:
            left_out.append((coded.number, coded.missing))
        else:
            rows.append(coded.row)
    if not rows:
        raise TrainingError(
            f"None of the {len(left_out)} rows holds anything to learn within {how.limit} tokens: "
            f"{named_rows(left_out)}.",
            dropped=len(left_out),
        )
    lines = unused.lines(len(rows) + len(left_out))
    return TokenizedRows(rows, truncated=truncated, left_out=left_out, unused=lines)


def _tokens(how: Reading) -> PreparedRows:
    """Tokenised rows without what nothing takes, and with labels where their masks let them be."""
    rows = how.rows
    if isinstance(rows, TokenizedRows):
        return PreparedRows(rows, rows.notes)
    found, listed = check_columns(how), isinstance(rows, (list, tuple))
    if any(how.columns.get(name, name) in found for name in _REWRITTEN):
        read = StreamedRows(how.coded) if is_stream(rows) else _in_memory(how)
        return PreparedRows(read, read.notes)
    extra = how.extra(found)
    unused = UnusedParts()
    unused.add((COLUMNS, repr(name)) for name in extra)
    notes = "; ".join(unused.lines())
    if not listed:
        if extra and hasattr(rows, "remove_columns"):
            rows = rows.remove_columns(extra)
        if how.columns:
            rows = _renamed_rows(rows, how.columns)
        return PreparedRows(rows, notes)
    if extra or how.columns:
        left = {*extra, *how.columns.values()} - how.columns.keys()
        rows = [{name: item for name, item in renamed(row, how.columns).items() if name not in left} for row in rows]
    return PreparedRows(TokenizedRows(rows, unused=unused.lines()), notes)


def _columns_of_all(rows: Any) -> tuple[str, ...]:
    """The columns that any row has: of the first alone where rows are a stream, or many that are read one by one."""
    many = is_stream(rows) or (not isinstance(rows, (list, tuple)) and len(rows) > _READ_THROUGH)
    if many or hasattr(rows, "column_names"):
        return columns_of(rows)
    each = (row_of(rows[number], number, {}).values for number in range(len(rows)))
    return tuple(dict.fromkeys(str(name) for values in each for name in values))


def check_columns(how: Reading) -> tuple[str, ...]:
    """Refuses tokenised rows in a list of which some lack what a batch of others has. Returns the columns of all.

    Raises:
        TrainingError: names the row.
    """
    found = _columns_of_all(how.rows)
    if not isinstance(how.rows, (list, tuple)):
        return found
    used = [name for name in found if name not in how.extra(found)]
    optional = {how.columns.get(name, name) for name in ("attention_mask", *LABELS, *_REWRITTEN)}
    for number, row in enumerate(how.rows):
        missing = next((name for name in used if name not in row and name not in optional), None)
        if missing is not None:
            raise TrainingError(f"Row {number} has no {missing!r}, which other rows have.", index=number)
    return found


def named_rows(left_out: Sequence[tuple[int, str]]) -> str:
    """Rows by number, with the reason: ``3 and 8 (nothing to learn)``."""
    parts = []
    for reason, count in Counter(reason for _, reason in left_out).items():
        numbers = [str(number) for number, why in left_out if why == reason]
        parts.append(f"{'row' if count == 1 else 'rows'} {few(numbers, _NAMED, quoted=False)}: {reason}")
    return "; ".join(parts)


def _renamed_rows(rows: Any, columns: Mapping[str, str]) -> Any:
    if is_stream(rows) or hasattr(rows, "rename_columns"):
        return rows.rename_columns({column: name for name, column in columns.items()})
    return TokenizedRows([renamed(row, columns) for row in rows])
