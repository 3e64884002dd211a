"""One row of data, read by the names of its form; errors name the row's number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

from nbpeft._util.numeric import is_finite_number
from nbpeft.errors import TrainingError, did_you_mean, few, in_one_line, with_article

WEIGHT = "weight"
"""The column or key with the factor on the loss of a row or of a turn of the assistant; 0 excludes it."""
LABEL = "label"
"""The column whose labels mark completions as good or bad, as in rows for preference tuning (KTO)."""
_GOOD = frozenset(("true", "good", "desirable", "chosen", "correct"))
_BAD = frozenset(("false", "bad", "undesirable", "rejected", "incorrect"))
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""The usual roles of chat templates."""
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "function",
    "observation": "tool",
    "function_call": "assistant",
}
"""``from`` of a ShareGPT turn -> the role in chat templates."""
_MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios", "pixel_values"))
"""Columns of rows and keys of messages with images, audio or video."""


@dataclass(frozen=True)
class Messages:
    """The messages of a row.

    Attributes:
        messages: the messages, with ``role`` and ``content`` as chat templates take them.
        weights: the factor on the loss of each message; None if the message has no weight.
        unused: names of keys of their content that are not used.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[float | None, ...] = ()
    unused: tuple[str, ...] = ()

    def __getitem__(self, part: slice) -> Messages:
        return Messages(self.messages[part], self.weights[part], self.unused)

    def followed_by(self, other: Messages) -> Messages:
        """These messages and then others."""
        return Messages(self.messages + other.messages, self.weights + other.weights, self.unused + other.unused)


@dataclass(frozen=True)
class Row:
    """One row, read by the names of its form.

    Attributes:
        values: column -> value.
        number: 0 for the first.
        columns: name in the form -> column, where they differ.
    """

    values: Mapping[str, Any]
    number: int
    columns: Mapping[str, str] = field(default_factory=dict)

    def error(self, what: str) -> TrainingError:
        """Creates an error that names this row."""
        return TrainingError(f"Row {self.number}: {what}", index=self.number)

    def value(self, name: str) -> Any:
        """The value of a column; None for an empty cell, also for a table's NaN or NA.

        Raises:
            TrainingError: the row has no such column.
        """
        column = self.columns.get(name, name)
        if column not in self.values:
            has = listed(self.values)
            raise self.error(f"{column!r} is missing; it has {has}.{did_you_mean(column, map(str, self.values))}")
        value = self.values[column]
        return None if is_empty_cell(value) else value

    def text(self, name: str) -> str:
        """The text of a column; the empty string for an empty cell.

        Raises:
            TrainingError: the value is not text.
        """
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{self.columns.get(name, name)!r} is {with_article(value)} ({value!r:.40}), not text.")
        return value or ""

    def listed(self, name: str, what: str) -> tuple[Any, ...]:
        """The items of a column with a list; none for an empty cell.

        Args:
            name: the form's name of the column.
            what: what the list has, for the message.

        Raises:
            TrainingError: the value is not a list.
        """
        value = self.value(name)
        value = value.tolist() if hasattr(value, "tolist") else value  # pandas and Parquet return arrays
        if value is not None and not isinstance(value, list | tuple):
            column = self.columns.get(name, name)
            raise self.error(f"{column!r} is {with_article(value)} ({value!r:.40}), not a list of {what}.")
        return tuple(value or ())

    def whole_number(self, name: str) -> int:
        """The whole number of a column.

        Raises:
            TrainingError: the value is not a whole number.
        """
        value = self.value(name)
        number = value.item() if hasattr(value, "item") else value  # pandas and Parquet return numpy scalars
        if isinstance(number, bool) or not isinstance(number, int):
            raise self.error(f"{name!r} is {with_article(value)} ({value!r:.40}), not a whole number.")
        return number

    def number_of(self, name: str) -> float:
        """The number of a column.

        Raises:
            TrainingError: the value is not a finite number.
        """
        value = self.value(name)
        number = value.item() if hasattr(value, "item") else value
        if not is_finite_number(number):
            column = self.columns.get(name, name)
            raise self.error(f"{column!r} is {with_article(value)} ({value!r:.40}), not a finite number.")
        return float(number)

    def optional(self, name: str) -> str:
        """The text of a column; the empty string if the row has no such column."""
        return self.text(name) if self.columns.get(name, name) in self.values else ""

    def weight(self, name: str = WEIGHT) -> float:
        """The factor on the loss of the row; 1 if the row has no such column.

        Raises:
            TrainingError: it is not a finite number of at least 0.
        """
        column = self.columns.get(name, name)
        given = self._weight(self.values.get(column), repr(column))
        return 1.0 if given is None else given

    def tools(self) -> Any:
        """The tools of a chat, for its template; None if there are none.

        Raises:
            TrainingError: they are given as text that is not JSON.
        """
        return self._json("tools")

    def variables(self, name: str) -> dict[str, Any]:
        """The variables of a column for the chat template; empty if there are none.

        Raises:
            TrainingError: they are not a dictionary, or text that is not JSON.
        """
        given = self._json(name)
        if given is not None and not isinstance(given, Mapping):
            raise self.error(f"{self.columns.get(name, name)!r} is {with_article(given)}, not a dictionary.")
        # Tables fill missing keys with None.
        return {str(key): value for key, value in (given or {}).items() if value is not None}

    def _json(self, name: str) -> Any:
        """The value of a column, which may be given as JSON; None if there is none."""
        column = self.columns.get(name, name)
        given: Any = self.values.get(column)
        if is_nothing(given):
            return None
        given = given.tolist() if hasattr(given, "tolist") else given
        try:
            return json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise self.error(f"{column!r} is text that is not JSON: {in_one_line(error)}.") from None

    def check_unused(self, name: str) -> None:
        """Refuses an unused column without which the row would have another meaning.

        Raises:
            TrainingError: the column has images, audio or video.
        """
        if name in _MEDIA:
            raise self.error(
                f"{name!r} cannot be trained on, only text can: remove the column to train on the text of the rows."
            )

    # Messages

    def messages(self, name: str) -> Messages:
        """The messages of a column; no messages for an empty cell.

        Args:
            name: the form's name of the column.

        Raises:
            TrainingError: it is not a list of messages, or a message cannot be read; names the message.
        """
        given, column = self.value(name), self.columns.get(name, name)
        given = given.tolist() if hasattr(given, "tolist") else given  # pandas and Parquet return arrays
        if given is None:
            return Messages()
        if not isinstance(given, (list, tuple)):
            raise self.error(f"{column!r} is {with_article(given)} ({given!r:.40}), not a list of messages.")
        read = [self._message(message, f"message {place} of {column!r}") for place, message in enumerate(given)]
        return Messages(
            tuple(message for message, _, _ in read),
            tuple(weight for _, weight, _ in read),
            tuple(dict.fromkeys(key for _, _, keys in read for key in keys)),
        )

    def _message(self, given: Any, where: str) -> tuple[Mapping[str, Any], float | None, list[str]]:
        """A message without its weight, the weight, and the names of unused keys of its content."""
        if not isinstance(given, Mapping):
            raise self.error(
                f"{where} is {with_article(given)} ({given!r:.40}), not a dictionary with role and content."
            )
        plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in given.items()}
        message = {
            key: value for key, value in plain.items() if value is not None
        }  # tables fill missing keys with None
        role = self._role(message, where)
        weight = self._weight(message.pop(WEIGHT, None), f"{WEIGHT!r} of {where}")
        media = next((key for key, value in message.items() if key in _MEDIA and not is_nothing(value)), None)
        if media is not None:
            raise self.error(f"{media!r} of {where} cannot be trained on, only text can.")
        if "content" not in message and "value" in message:
            message["content"] = message.pop("value")
        content = message.get("content")
        if is_empty_cell(content):
            content = self._no_content(given, message, role, where)
        content, unused = self._content(content, where)
        if content is not None:
            message["content"] = content
        return {"role": role, **message}, weight, unused

    def _role(self, message: dict[str, Any], where: str) -> str:
        key = next((key for key in ("role", "from") if key in message), None)
        if key is None:
            raise self.error(
                f"{where} has no 'role' (or 'from'); it has {listed(message)}. Rename them to role and content."
            )
        role = message.pop(key)
        if not isinstance(role, str):
            raise self.error(f"{where}: {key!r} is {with_article(role)}, not the name of a role.")
        if key == "from" and role not in SHAREGPT_ROLES:
            raise self.error(f"{where} is from {role!r:.40}.{nearest_role(role, SHAREGPT_ROLES)}")
        return SHAREGPT_ROLES[role] if key == "from" else role

    def _no_content(self, given: Mapping[str, Any], message: dict[str, Any], role: str, where: str) -> Any:
        """The content of a message that has none: None if it has tool calls, else empty for a turn of the assistant."""
        if not is_nothing(message.get("tool_calls")):
            message.pop("content", None)
            return None
        if not {"content", "value"} & given.keys():
            raise self.error(f"{where} has no 'content' (or 'value'); it has {listed(given)}.")
        if role != "assistant":
            raise self.error(f"{where} has no text: 'content' is None.")
        return ""

    def _content(self, content: Any, where: str) -> tuple[Any, list[str]]:
        """The content, with each part as a dictionary if it is a list, and the names of unused keys of the parts."""
        if content is None or isinstance(content, str):
            return content, []
        content = content.tolist() if hasattr(content, "tolist") else content
        if not isinstance(content, (list, tuple)):
            raise self.error(f"{where} has no text: 'content' is {with_article(content)}.")
        parts, unused = [], []
        for part in content:
            part = {"type": "text", "text": part} if isinstance(part, str) else part
            kind = part.get("type") if isinstance(part, Mapping) else with_article(part)
            if kind != "text" or not isinstance(part.get("text"), str):
                raise self.error(
                    f"{where} has content of type {kind!r:.40}; only text can be trained on: "
                    "{'type': 'text', 'text': …}."
                )
            parts.append({"type": "text", "text": part["text"]})
            extra = [key for key, value in part.items() if key not in ("type", "text") and not is_nothing(value)]
            unused += [f"{key!r} of parts of a content" for key in extra]
        return parts, unused

    def _weight(self, value: Any, where: str) -> float | None:
        if value is None:
            return None
        try:
            weight = float(value)
        except (TypeError, ValueError, OverflowError):
            weight = math.nan
        if not (math.isfinite(weight) and weight >= 0):
            raise self.error(f"{where} is {value!r:.40}; expected a number of at least 0.")
        return weight


def is_empty_cell(value: Any) -> bool:
    """Whether a value is missing: None, or the NaN or NA of a table."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def is_nothing(value: Any) -> bool:
    """Whether a value is empty: an empty cell, blank text, or an empty list or dictionary."""
    if isinstance(value, str):
        return not value.strip()
    if getattr(value, "shape", None) == ():
        value = value.item()
    return is_empty_cell(value) or (isinstance(value, Sized) and not len(value))


def listed(names: Iterable[Any]) -> str:
    """Names for a person."""
    return few(map(str, names), 8) or "no columns"


def nearest_role(role: str, known: Sequence[str] | Mapping[str, str]) -> str:
    """A hint at the closest role, for a message.

    Args:
        role: the unknown role.
        known: the known roles.
    """
    return did_you_mean(role, known) or f" Known: {', '.join(known)}."


def is_good(label: Any) -> bool | None:
    """Whether a label marks a completion as good: True and 1 do; False, 0 and -1 mark it as bad.

    Args:
        label: the label of a row; words such as ``"good"`` and numbers as text are recognized too.

    Returns:
        None for a label with another meaning.
    """
    label = label.item() if getattr(label, "shape", None) == () else label
    if isinstance(label, str) and label.strip().lower() in _GOOD | _BAD:
        return label.strip().lower() in _GOOD
    try:
        return {1.0: True, 0.0: False, -1.0: False}.get(float(label))
    except (TypeError, ValueError, OverflowError):
        return None


def are_verdicts(labels: Iterable[Any]) -> bool:
    """Whether all labels of a column mark completions as good or bad; with any other label they are classes."""
    return all(is_nothing(label) or is_good(label) is not None for label in labels)


def labels_in(rows: Any, column: str) -> Iterable[Any]:
    """The values of a column.

    Args:
        rows: the rows; those that are not dictionaries are skipped. Of a dataset only this column is read.
        column: the name of the column.
    """
    selected = rows.select_columns(column) if hasattr(rows, "select_columns") else rows
    return (row.get(column) for row in selected if isinstance(row, Mapping))
