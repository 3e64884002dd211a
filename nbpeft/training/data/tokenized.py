"""Rows of a notebook become tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from nbpeft.errors import TrainingError, did_you_mean, with_article
from nbpeft.training.data.chats import render_chat
from nbpeft.training.data.encoding import IGNORED, Encoded, encode

DEFAULT_MAX_LENGTH = 1024
_FORMATS = "input_ids, text, prompt and completion, or messages"
_COLUMNS = ("input_ids", "labels", "text", "prompt", "completion", "messages")


class TokenizedRows(Dataset[dict[str, Any]]):
    """Tokenised rows in memory.

    Attributes:
        truncated: Rows that were cut to ``max_length``.
        dropped: Rows left out because nothing in them could be learned.
        token_count: Tokens of all rows.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], *, truncated: int = 0, dropped: int = 0) -> None:
        self._rows = rows
        self.truncated = truncated
        self.dropped = dropped

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

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
        if self.dropped:
            parts.append(f"{self.dropped} rows without anything to learn were left out")
        return "; ".join(parts)


def prepare_data(
    data: Any, tokenizer: Any = None, *, max_length: int | None = None, encoder_decoder: bool = False
) -> Any:
    """Turns rows into something a Trainer can be given.

    Args:
        data: A ``datasets.Dataset``, a list of dictionaries or strings, or a torch dataset of
            dictionaries. Rows that have ``input_ids`` are handed on as they are.
        tokenizer: Needed for all other rows.
        max_length: Tokens a row is cut to; by default what the tokenizer allows, at most 1024.
        encoder_decoder: Whether prompt and completion go to different halves of the model.

    Raises:
        TrainingError: the data has another form; the message names what was found.
    """
    columns = columns_of(data)
    if "input_ids" in columns:
        return TokenizedRows(data) if isinstance(data, (list, tuple)) else data
    kind = _kind(columns)
    if tokenizer is None:
        raise TrainingError(f"Rows with {kind} need a tokenizer (tokenizer=…)", columns=columns)
    limit = max_length or min(int(getattr(tokenizer, "model_max_length", DEFAULT_MAX_LENGTH)), DEFAULT_MAX_LENGTH)
    rows: list[dict[str, Any]] = []
    truncated = dropped = 0
    for index, row in enumerate(data):
        encoded = _encode_row({"text": row} if isinstance(row, str) else row, index, kind, tokenizer, encoder_decoder)
        truncated += len(encoded.input_ids) > limit or len(encoded.labels) > limit
        encoded = Encoded(encoded.input_ids[:limit], encoded.labels[:limit])
        if all(label == IGNORED for label in (encoded.labels if encoder_decoder else encoded.labels[1:])):
            dropped += 1
            continue
        rows.append({"input_ids": encoded.input_ids, "labels": encoded.labels})
    if not rows:
        raise TrainingError(
            f"None of the {dropped} rows holds anything to learn within {limit} tokens: the loss is on the "
            f"{'text' if kind == 'text' else 'completion or assistant turns'}, which is empty or cut off.",
            dropped=dropped,
        )
    return TokenizedRows(rows, truncated=truncated, dropped=dropped)


def columns_of(data: Any) -> tuple[str, ...]:
    """Names of the columns of a dataset or a list of rows.

    Raises:
        TrainingError: it is not a dataset with named columns, or it is empty.
    """
    if isinstance(data, Mapping):
        splits = [str(name) for name in data]
        if any(hasattr(part, "column_names") for part in data.values()):
            raise TrainingError(
                f"This is a dictionary of datasets; pass one of them: {', '.join(splits)}.", splits=splits
            )
        raise TrainingError(
            f"Expected a list of rows or a datasets.Dataset, found a dictionary with {_listed(splits)}."
        )
    names = getattr(data, "column_names", None)
    if names is not None:
        if len(data) == 0:
            raise TrainingError("The dataset has no rows.")
        return tuple(names)
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        raise TrainingError(
            "Expected a list of rows or a datasets.Dataset, found a table: pass table.to_dict('records')."
        )
    if isinstance(data, (str, bytes)) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TrainingError(f"Expected a list of rows or a datasets.Dataset, found {with_article(data)}.")
    if len(data) == 0:
        raise TrainingError("The data has no rows.")
    first = data[0]
    if isinstance(first, str):
        return ("text",)
    if not isinstance(first, Mapping):
        raise TrainingError(f"Expected rows that are dictionaries with {_FORMATS}; row 0 is {with_article(first)}.")
    return tuple(str(name) for name in first)


def is_plain(data: Any) -> bool | None:
    """Whether rows are text that no chat template goes around; None for rows that are tokens already.

    Raises:
        TrainingError: the data has no form that can be trained on.
    """
    columns = columns_of(data)
    if "input_ids" in columns:
        return None
    kind = _kind(columns)
    return kind == "text" or (kind == "prompt and completion" and isinstance(data[0]["prompt"], str))


def _kind(columns: tuple[str, ...]) -> str:
    if "messages" in columns:
        return "messages"
    if "prompt" in columns and "completion" in columns:
        return "prompt and completion"
    if "text" in columns:
        return "text"
    hints = [hint for column in columns if (hint := did_you_mean(column, _COLUMNS))]
    raise TrainingError(
        f"Expected columns {_FORMATS}; found {_listed(columns)}.{hints[0] if hints else ''}", columns=columns
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "") if names else "no columns"


def _encode_row(row: Mapping[str, Any], index: int, kind: str, tokenizer: Any, encoder_decoder: bool) -> Encoded:
    try:
        if kind == "text":
            if encoder_decoder:
                raise TrainingError("An encoder-decoder model needs rows with prompt and completion, found text.")
            return encode(tokenizer, row["text"], [(0, len(row["text"]))], whole=True)
        if kind == "messages":
            return encode(tokenizer, *render_chat(tokenizer, row["messages"], tools=row.get("tools")), special=False)
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, str):
            text, spans = render_chat(tokenizer, [*prompt, *completion], first=len(prompt), tools=row.get("tools"))
            return encode(tokenizer, text, spans, special=False)
        if encoder_decoder:
            return Encoded(list(tokenizer(prompt)["input_ids"]), list(tokenizer(completion)["input_ids"]))
        text = prompt + completion
        return encode(tokenizer, text, [(len(prompt), len(text))])
    except (KeyError, TypeError) as error:
        raise TrainingError(
            f"Row {index} does not have the form of the first row ({kind}): {type(error).__name__}: {error}.",
            index=index,
        ) from error
