"""Rows of any form become tokens: all at once, or as a stream gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from nbpeft.display.numbers import plural
from nbpeft.errors import TrainingError, in_one_line
from nbpeft.training.data.chats import render_chat
from nbpeft.training.data.encoding import IGNORED, Encoded, encode
from nbpeft.training.data.forms import (
    Chat,
    Example,
    Form,
    Pair,
    Plain,
    check_roles,
    checked_columns,
    form_of,
    keys_of,
    row_of,
)
from nbpeft.training.data.sources import first_row, is_stream, open_data

DEFAULT_MAX_LENGTH = 1024
_NAMED = 5
"""Rows left out that a note names."""


class TokenizedRows(Dataset[dict[str, Any]]):
    """Tokenised rows in memory.

    Attributes:
        truncated: Rows that were cut to ``max_length``.
        left_out: Number of each row left out because nothing in it could be learned, and why.
        token_count: Tokens of all rows.
    """

    def __init__(
        self, rows: Sequence[dict[str, Any]], *, truncated: int = 0, left_out: Sequence[tuple[int, str]] = ()
    ) -> None:
        self._rows = rows
        self.truncated = truncated
        self.left_out = tuple(left_out)

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
        """What was cut or left out, in one line; empty if nothing was."""
        parts = []
        if self.truncated:
            parts.append(f"{self.truncated} of {len(self) + self.dropped} rows were cut to the maximal length")
        if self.left_out:
            parts.append(f"{plural(self.dropped, 'row')} left out: {named_rows(self.left_out)}")
        return "; ".join(parts)

    def select(self, indices: Iterable[int]) -> TokenizedRows:
        """Some of the rows."""
        return TokenizedRows([self._rows[index] for index in indices])


class StreamedRows(IterableDataset[dict[str, Any]]):
    """Rows that are tokenised as a stream gives them, in its order; a bad one raises when it comes.

    Args:
        coded: starts the stream anew.
        check: called with each row and its number.
        skipped: rows with something to learn that are left to others.
    """

    def __init__(
        self,
        coded: Callable[[], Iterator[CodedRow]],
        check: Callable[[Mapping[str, Any], int], None] = lambda row, number: None,
        skipped: int = 0,
    ) -> None:
        self._coded = coded
        self.check = check
        self.skipped = skipped

    def __iter__(self) -> Iterator[dict[str, Any]]:
        passed = 0
        for coded in self._coded():
            if coded.missing:
                continue
            passed += 1
            if passed > self.skipped:
                row = coded.row
                self.check(row, coded.number)
                yield row

    def after(self, count: int) -> StreamedRows:
        """The same stream without its first rows."""
        return StreamedRows(self._coded, self.check, self.skipped + count)


@dataclass(frozen=True)
class CodedRow:
    """One tokenised row, before what is too long is cut off.

    Attributes:
        number: 0 for the first.
        whole: All of it.
        limit: Tokens it is cut to.
        encoder_decoder: Whether the labels stand for themselves, and not beside the ids.
        empty: What is empty though it should be learned; nothing if there is nothing such.
        more: What the row holds beside tokens and labels, by column.
    """

    number: int
    whole: Encoded
    limit: int
    encoder_decoder: bool = False
    empty: str = ""
    more: Mapping[str, int] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, Any]:
        """What a model is trained on."""
        ids, labels = self.whole.input_ids[: self.limit], self.whole.labels[: self.limit]
        return {"input_ids": ids, "labels": labels, **self.more}

    @property
    def cut(self) -> bool:
        """Whether it is too long."""
        return len(self.whole.input_ids) > self.limit or len(self.whole.labels) > self.limit

    @property
    def missing(self) -> str:
        """Why nothing is learned from it; empty if something is."""
        if self.empty:
            return f"{self.empty} is empty"
        if count_learned(self.row["labels"], self.encoder_decoder):
            return ""
        return f"nothing to learn within {self.limit} tokens" if self.cut else "nothing to learn"


@dataclass(frozen=True)
class Reading:
    """How the rows of some data are read and tokenised.

    Attributes:
        rows: the opened data.
        form: of the rows, or None where they are tokenised.
        columns: name in the form -> column, where they differ.
        tokenizer: of the model.
        limit: tokens a row is cut to.
        encoder_decoder: whether prompt and completion go to different halves of the model.
        also: columns whose whole numbers rows keep beside tokens and labels.
    """

    rows: Any
    form: Form | None
    columns: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Any = None
    limit: int = DEFAULT_MAX_LENGTH
    encoder_decoder: bool = False
    also: tuple[str, ...] = ()

    @property
    def has_template(self) -> bool:
        """Whether chats can be rendered."""
        return bool(getattr(self.tokenizer, "chat_template", None)) and not self.encoder_decoder

    def example(self, value: Any, number: int) -> Example:
        """What a row says.

        Raises:
            TrainingError: it has not the form of the first row; names it.
        """
        assert self.form is not None
        return self.form.read(row_of(value, number, self.columns), self.has_template)

    def coded(self) -> Iterator[CodedRow]:
        """The rows, tokenised one after the other; those that are tokens already as they are.

        Raises:
            TrainingError: a row cannot be read; names it.
        """
        for number, value in enumerate(self.rows):
            if self.form is None:
                yield self._as_it_is(value, number)
                continue
            example = self.example(value, number)
            whole = _encode(example, number, self.tokenizer, self.encoder_decoder)
            row = row_of(value, number, self.columns)
            more = {name: row.whole_number(name) for name in self.also}
            yield CodedRow(number, whole, self.limit, self.encoder_decoder, _empty_part(example), more)

    def _as_it_is(self, value: Any, number: int) -> CodedRow:
        """A tokenised row; the batches copy labels from the ids where a row has none."""
        row = renamed(value, self.columns)
        ids, labels = _listed(row.get("input_ids", ())), row.get("labels")
        seen = _listed(row.get("attention_mask", [1] * len(ids)))
        copied = [token if seen else IGNORED for token, seen in zip(ids, seen, strict=False)]
        given = copied if labels is None else _listed(labels)
        return CodedRow(number, Encoded(ids, given), max(len(ids), len(given)), self.encoder_decoder)


def reading(
    data: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    encoder_decoder: bool = False,
    columns: Mapping[str, str] | None = None,
    also: Collection[str] = (),
) -> Reading:
    """How data is read; see :func:`prepare_data`.

    Raises:
        TrainingError: the data has no form that can be read, or it needs a tokenizer.
    """
    rows = open_data(data)
    found = columns_of(rows)
    mapping = checked_columns(columns, found)
    form = form_of(found, columns or {})
    if form is None:
        return Reading(rows, None, mapping, tokenizer, encoder_decoder=encoder_decoder)
    if tokenizer is None:
        raise TrainingError(f"Rows with {form.name} need a tokenizer (tokenizer=…)", columns=found)
    limit, more = max_length or default_length(tokenizer), tuple(name for name in also if name in found)
    return Reading(rows, form, mapping, tokenizer, limit, encoder_decoder, more)


def default_length(tokenizer: Any) -> int:
    """Tokens that rows are cut to where nothing else is said."""
    return min(int(getattr(tokenizer, "model_max_length", DEFAULT_MAX_LENGTH)), DEFAULT_MAX_LENGTH)


def prepare_data(
    data: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    encoder_decoder: bool = False,
    columns: Mapping[str, str] | None = None,
    also: Collection[str] = (),
) -> Any:
    """Turns rows into something a Trainer can be given.

    Args:
        data: Rows, or where they are; see :func:`open_data`. Rows that have ``input_ids`` are handed on as
            they are; a stream is tokenised as it comes.
        tokenizer: Needed for all other rows.
        max_length: Tokens a row is cut to; by default what the tokenizer allows, at most 1024.
        encoder_decoder: Whether prompt and completion go to different halves of the model.
        columns: What the columns are called: ``{"prompt": "question", "completion": "answer"}``.
        also: Columns whose whole numbers rows keep beside tokens and labels, where there are such: ``task_ids``.

    Raises:
        TrainingError: the data has another form; the message names what was found.
    """
    how = reading(data, tokenizer, max_length=max_length, encoder_decoder=encoder_decoder, columns=columns, also=also)
    if how.form is None:
        if how.columns:
            return _renamed_rows(how.rows, how.columns)
        return TokenizedRows(how.rows) if isinstance(how.rows, (list, tuple)) else how.rows
    if is_stream(how.rows):
        return StreamedRows(how.coded)
    rows: list[dict[str, Any]] = []
    left_out: list[tuple[int, str]] = []
    truncated = 0
    for coded in how.coded():
        truncated += coded.cut
        if coded.missing:
            left_out.append((coded.number, coded.missing))
        else:
            rows.append(coded.row)
    if not rows:
        raise TrainingError(
            f"None of the {len(left_out)} rows holds anything to learn within {how.limit} tokens: the loss is on the "
            f"{'text' if how.form.name == 'text' else 'completion or assistant turns'}, which is empty or cut off.",
            dropped=len(left_out),
        )
    return TokenizedRows(rows, truncated=truncated, left_out=left_out)


def columns_of(data: Any) -> tuple[str, ...]:
    """Names of the columns of data.

    Raises:
        TrainingError: it has no named columns, or it is empty.
    """
    rows = open_data(data)
    names = getattr(rows, "column_names", None)
    return tuple(map(str, names)) if names is not None else keys_of(first_row(rows))


def is_plain(data: Any, tokenizer: Any = None, columns: Mapping[str, str] | None = None) -> bool | None:
    """Whether rows are text that no chat template goes around; None for rows that are tokens already.

    Args:
        data: as for :func:`prepare_data`.
        tokenizer: its chat template goes around rows with an instruction.
        columns: as for :func:`prepare_data`.

    Raises:
        TrainingError: the data has no form that can be trained on.
    """
    rows = open_data(data)
    found = columns_of(rows)
    how = Reading(rows, form_of(found, columns or {}), checked_columns(columns, found), tokenizer)
    return None if how.form is None else not isinstance(how.example(first_row(rows), 0), Chat)


def count_learned(labels: Sequence[int], encoder_decoder: bool = False) -> int:
    """How many tokens a loss is taken on: a decoder does not predict the first one."""
    return sum(label != IGNORED for label in (labels if encoder_decoder else labels[1:]))


def named_rows(left_out: Sequence[tuple[int, str]]) -> str:
    """Rows by number, with the reason: ``3 and 8 (nothing to learn)``."""
    parts = []
    for reason, count in Counter(reason for _, reason in left_out).items():
        numbers = [str(number) for number, why in left_out if why == reason]
        more = f", … ({count} in all)" if count > _NAMED else ""
        parts.append(f"{'row' if count == 1 else 'rows'} {', '.join(numbers[:_NAMED])}{more}: {reason}")
    return "; ".join(parts)


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A tokenised row with the names that models know."""
    return {**row, **{name: row[column] for name, column in columns.items()}}


def _renamed_rows(rows: Any, columns: Mapping[str, str]) -> Any:
    if is_stream(rows) or hasattr(rows, "rename_columns"):
        return rows.rename_columns({column: name for name, column in columns.items()})
    return TokenizedRows([renamed(row, columns) for row in rows])


def _encode(example: Example, number: int, tokenizer: Any, encoder_decoder: bool) -> Encoded:
    if isinstance(example, Chat):
        return _encode_chat(example, number, tokenizer)
    if isinstance(example, Pair):
        if encoder_decoder:
            completion = list(tokenizer(example.completion)["input_ids"])
            return Encoded(list(tokenizer(example.prompt)["input_ids"]), completion)
        text = example.prompt + example.completion
        return encode(tokenizer, text, [(len(example.prompt), len(text))])
    if encoder_decoder:
        raise TrainingError("An encoder-decoder model needs rows with prompt and completion, found text.")
    return encode(tokenizer, example.text, [(0, len(example.text))], whole=True)


def _encode_chat(chat: Chat, number: int, tokenizer: Any) -> Encoded:
    check_roles(number, chat, str(getattr(tokenizer, "chat_template", "") or ""))
    try:
        text, spans = render_chat(tokenizer, chat.messages, first=chat.first, tools=chat.tools)
    except TrainingError as error:
        if not getattr(tokenizer, "chat_template", None):  # no row can be rendered
            raise
        raise TrainingError(f"Row {number}: {error}", index=number) from None
    except Exception as error:  # a template runs code of its own, and has ways to refuse a chat
        raise TrainingError(
            f"Row {number}: the chat template refuses it: {in_one_line(error) or type(error).__name__}", index=number
        ) from None
    return encode(tokenizer, text, spans, special=False)


def _empty_part(example: Example) -> str:
    """What is empty of a row from which only its end could be learned."""
    if isinstance(example, Pair):
        return "" if example.completion.strip() else "the completion"
    return "the text" if isinstance(example, Plain) and not example.text.strip() else ""


def _listed(value: Any) -> list[Any]:
    """Numbers of a row as a list; none for a single one, such as a class."""
    found = value.tolist() if hasattr(value, "tolist") else value
    return list(found) if isinstance(found, (list, tuple)) else []
