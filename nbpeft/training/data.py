"""Rows of a notebook become batches: tokenised once, loss only where it belongs.

    {"input_ids", …}              as it is; labels are copied from input_ids where they are missing
    {"text"} or a string          loss on the whole text
    {"prompt", "completion"}      loss on the completion
    {"messages": [...]}           the tokenizer's chat template; loss on the assistant's turns

Prompt and completion may be lists of messages too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nbpeft.errors import TrainingError, did_you_mean, with_article

DEFAULT_MAX_LENGTH = 1024
IGNORED = -100
"""The label that no loss is taken on."""
_CHECKED_ROWS = 10_000
"""How many rows are checked; the others are assumed to be like them."""
_FORMATS = "input_ids, text, prompt and completion, or messages"
_COLUMNS = ("input_ids", "labels", "text", "prompt", "completion", "messages")

Span = tuple[int, int]
"""First character, and the one after the last."""


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


# Text with marked parts becomes token ids and labels.


@dataclass(frozen=True)
class Encoded:
    """One tokenised row; for decoders both lists have one entry per token."""

    input_ids: list[int]
    labels: list[int]


def encode(tokenizer: Any, text: str, spans: Sequence[Span], *, special: bool = True, whole: bool = False) -> Encoded:
    """Tokenises ``text``, with labels on the tokens that touch one of ``spans``.

    Prompt and completion are tokenised together, as they would be read together; a token that
    reaches over the border belongs to the completion.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The whole row.
        spans: Parts to learn, in characters.
        special: Whether the tokenizer may add its special tokens, and an end-of-text token is
            learned after the row. False for chats, whose template has written them.
        whole: Whether every token is learned.
    """
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        learned = [
            any(start < last and end > first for first, last in spans) for start, end in encoding["offset_mapping"]
        ]
    else:
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        learned = _by_prefix(tokenizer, text, ids, spans, special)
    labels = [token if whole or learns else IGNORED for token, learns in zip(ids, learned, strict=True)]
    end = getattr(tokenizer, "eos_token_id", None)
    if special and end is not None:
        if ids and ids[-1] == end:
            labels[-1] = end
        else:
            ids, labels = [*ids, end], [*labels, end]
    return Encoded(ids, labels)


def _by_prefix(tokenizer: Any, text: str, ids: list[int], spans: Sequence[Span], special: bool) -> list[bool]:
    """Without offsets: how many tokens a beginning of the text has in common with the whole."""

    def tokens_before(character: int) -> int:
        if character >= len(text):
            return len(ids)
        beginning = tokenizer(text[:character], add_special_tokens=special)["input_ids"]
        pairs = enumerate(zip(beginning, ids, strict=False))
        return next((index for index, (one, other) in pairs if one != other), min(len(beginning), len(ids)))

    borders = [(tokens_before(first), tokens_before(last)) for first, last in spans]
    return [any(first <= index < last for first, last in borders) for index in range(len(ids))]


# Chats become text with the turns of the assistant marked.


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, first: int = 0, tools: Any = None
) -> tuple[str, list[Span]]:
    """Renders messages with the tokenizer's chat template.

    Args:
        tokenizer: A tokenizer of transformers that has a chat template.
        messages: Dictionaries with ``role`` and ``content``.
        first: Messages before this one are not learned.
        tools: Handed on to the template.

    Returns:
        The text, and where in it the assistant speaks, end-of-turn marks included.

    Raises:
        TrainingError: there is no template, or no turn of the assistant.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TrainingError(
            "The tokenizer has no chat template: set tokenizer.chat_template, or give rows with prompt and completion."
        )
    turns = [index for index in range(first, len(messages)) if messages[index].get("role") == "assistant"]
    if not turns:
        roles = sorted({str(message.get("role")) for message in messages})
        raise TrainingError(f"No turn of the assistant to learn from; the roles found are {', '.join(roles)}.")

    def render(count: int, prompt: bool = False) -> str:
        options = {} if tools is None else {"tools": tools}
        return str(
            tokenizer.apply_chat_template(
                list(messages[:count]), tokenize=False, add_generation_prompt=prompt, **options
            )
        )

    text = render(len(messages))
    spans, cursor = [], 0
    for index in turns:
        span = _by_rendering(render, text, index) or _by_content(tokenizer, text, messages[index], cursor)
        if span is None:
            raise TrainingError(f"The chat template does not show turn {index} of the assistant as it is written.")
        spans.append(span)
        cursor = span[1]
    return text, spans


def _by_rendering(render: Any, text: str, index: int) -> Span | None:
    """From the end of the prompt for a turn to the end of the chat up to and with it."""
    before = render(index, prompt=True) if index else ""
    through = render(index + 1)
    if through.startswith(before) and text.startswith(through):
        return len(before), len(through)
    return None


def _by_content(tokenizer: Any, text: str, message: Mapping[str, Any], cursor: int) -> Span | None:
    """For templates that rewrite earlier turns: where the content stands, and the mark after it."""
    content = message.get("content")
    if not isinstance(content, str) or not content:
        return None
    start = text.find(content, cursor)
    if start < 0:
        return None
    end = start + len(content)
    mark = getattr(tokenizer, "eos_token", None)
    return start, end + len(mark) if mark and text.startswith(mark, end) else end


# Whether rows fit a model, before a step fails on them with an error that names no row.


def check_rows(rows: Any, *, vocabulary: int | None, causal: bool) -> None:
    """Looks at the token ids and labels of rows.

    Args:
        rows: A dataset of dictionaries with ``input_ids``.
        vocabulary: How many ids the model's embedding has, or None.
        causal: Whether labels stand beside the ids, one for one.

    Raises:
        TrainingError: a row cannot be learned; the message names it.
    """
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        return
    for index in range(min(len(rows), _CHECKED_ROWS)):
        row = rows[index]
        if not isinstance(row, Mapping) or "input_ids" not in row:
            return
        ids = _token_ids(row["input_ids"], index)
        outside = ids[(ids < 0) | (ids >= vocabulary)] if vocabulary is not None else ids[:0]
        if len(outside):
            raise TrainingError(
                f"Row {index} has the token id {int(outside[0])}, but the model knows ids from 0 to "
                f"{(vocabulary or 0) - 1}: tokenise with the tokenizer of this model.",
                index=index,
            )
        labels = row.get("labels")
        if causal and labels is not None and len(labels) != len(ids):
            raise TrainingError(f"Row {index} has {len(labels)} labels for {len(ids)} tokens.", index=index)


def _token_ids(value: Any, index: int) -> Tensor:
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0, 0)
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise TrainingError(f"Row {index}: input_ids must be a list of token ids, not {value!r:.60}.", index=index)
    return ids


# Batches


@dataclass
class Collator:
    """Pads rows on the right into batches of tensors.

    ``labels`` are padded with -100, ``input_ids`` with the padding token, everything else with 0;
    single numbers become a (batch,) tensor, and ``label`` is called ``labels``.

    Attributes:
        pad_token_id: What ``input_ids`` are padded with.
        copy_labels: Whether rows without labels get their ``input_ids`` as labels.
        pad_to_multiple_of: Lengths are rounded up to it.
    """

    pad_token_id: int = 0
    copy_labels: bool = False
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows as one batch; sequences become (batch, longest)."""
        renamed = [
            {"labels" if key in ("label", "label_ids") else key: value for key, value in row.items()} for row in rows
        ]
        complete = [self._complete(row) for row in renamed]
        batch = {}
        for key in complete[0]:
            values = [torch.as_tensor(row[key]) for row in complete]
            if values[0].ndim == 0:
                batch[key] = torch.stack(values)
                continue
            length = max(len(value) for value in values)
            if self.pad_to_multiple_of and values[0].ndim == 1:
                length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
            filler = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(key, 0)
            batch[key] = torch.stack([_padded(value, length, filler) for value in values])
        return batch

    def _complete(self, row: dict[str, Any]) -> dict[str, Any]:
        if "input_ids" not in row:
            return row
        if "attention_mask" not in row:
            row["attention_mask"] = [1] * len(row["input_ids"])
        if self.copy_labels and "labels" not in row:
            mask = zip(row["input_ids"], row["attention_mask"], strict=True)
            row["labels"] = [int(token) if seen else IGNORED for token, seen in mask]
        return row


def _padded(value: Tensor, length: int, filler: int) -> Tensor:
    if len(value) == length:
        return value
    padding = value.new_full((length - len(value), *value.shape[1:]), filler)
    return torch.cat([value, padding])
