"""The forms that rows have, recognised by their keys, and what each row says, or what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbpeft.errors import TrainingError, did_you_mean, with_article

TOKENISED = "input_ids"

_ROLES = {
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
"""What the turns of a ShareGPT row are from, and the roles that chat templates know."""
_TEMPLATE_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_PROMPTS = ("question", "query", "instruction", "input", "source", "context", "user")
_COMPLETIONS = ("answer", "response", "output", "target", "completion", "solution", "assistant", "reply", "chosen")
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Plain:
    """Text that is learned whole."""

    text: str


@dataclass(frozen=True)
class Pair:
    """A prompt, and the completion that is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation, whose turns of the assistant are learned.

    Attributes:
        messages: with ``role`` and ``content``.
        first: messages before this one are not learned.
        tools: for the chat template.
    """

    messages: tuple[Mapping[str, Any], ...]
    first: int = 0
    tools: Any = None


Example = Plain | Pair | Chat


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
        """The error that names this row."""
        return TrainingError(f"Row {self.number}: {what}", index=self.number)

    def value(self, name: str) -> Any:
        """The value of a column.

        Raises:
            TrainingError: the row has no such column, or nothing in it.
        """
        column = self.columns.get(name, name)
        if column not in self.values:
            has = listed(self.values)
            raise self.error(f"{column!r} is missing; it has {has}.{did_you_mean(column, map(str, self.values))}")
        value = self.values[column]
        if is_empty_cell(value):
            raise self.error(f"{column!r} is {'None' if value is None else 'NaN, an empty cell of a table'}.")
        return value

    def text(self, name: str) -> str:
        """The text of a column.

        Raises:
            TrainingError: it holds something else.
        """
        value = self.value(name)
        if not isinstance(value, str):
            raise self.error(f"{self.columns.get(name, name)!r} is {with_article(value)} ({value!r:.40}), not text.")
        return value

    def whole_number(self, name: str) -> int:
        """The whole number of a column.

        Raises:
            TrainingError: it holds something else.
        """
        value = self.value(name)
        number = value.item() if hasattr(value, "item") else value  # pandas and Parquet give numbers of numpy
        if isinstance(number, bool) or not isinstance(number, int):
            raise self.error(f"{name!r} is {with_article(value)} ({value!r:.40}), not a whole number.")
        return number

    def optional(self, name: str) -> str:
        """The text of a column that may be missing or empty."""
        value = self.values.get(self.columns.get(name, name))
        return "" if is_empty_cell(value) else self.text(name)

    def turns(self, name: str, *, none: bool = False) -> tuple[Mapping[str, Any], ...]:
        """The messages of a column, as chat templates want them.

        Args:
            name: the column, as the form calls it.
            none: whether there may be none.

        Raises:
            TrainingError: it is not a list of messages; names the turn.
        """
        given, column = self.value(name), self.columns.get(name, name)
        given = given.tolist() if hasattr(given, "tolist") else given  # pandas and Parquet give arrays
        if not isinstance(given, (list, tuple)):
            raise self.error(f"{column!r} is {with_article(given)} ({given!r:.40}), not a list of messages.")
        if not given and not none:
            raise self.error(f"{column!r} is an empty list.")
        return tuple(self._turn(turn, place, column) for place, turn in enumerate(given))

    def _turn(self, turn: Any, place: int, column: str) -> Mapping[str, Any]:
        where = f"message {place} of {column!r}"
        if not isinstance(turn, Mapping):
            raise self.error(f"{where} is {with_article(turn)} ({turn!r:.40}), not a dictionary with role and content.")
        key = next((key for key in ("role", "from") if key in turn), None)
        if key is None:
            raise self.error(f"{where} has no 'role' (or 'from'); it has {listed(turn)}.")
        role = turn[key]
        if not isinstance(role, str):
            raise self.error(f"{where}: {key!r} is {with_article(role)}, not the name of a role.")
        content = turn.get("content", turn.get("value"))
        if not isinstance(content, (str, list)) and not turn.get("tool_calls"):
            raise self.error(
                f"{where} has no text: 'content' is {with_article(content)}."
                if "content" in turn or "value" in turn
                else f"{where} has no 'content' (or 'value'); it has {listed(turn)}."
            )
        if key == "role":
            return turn if "content" in turn or "value" not in turn else {**turn, "content": content}
        if role not in _ROLES:
            raise self.error(f"{where} is from {role!r:.40}.{_known_roles(role, _ROLES)}")
        return {"role": _ROLES[role], "content": content}


@dataclass(frozen=True)
class Form:
    """One of the forms that rows can have.

    Attributes:
        name: what a person calls it.
        needs: the columns that it is recognised by.
        may: further columns that it reads.
        read: gets a row, and whether the tokenizer has a chat template.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row, bool], Example]
    may: tuple[str, ...] = ()


def _read_text(row: Row, chat: bool) -> Example:
    return Plain(row.text("text"))


def _read_pair(row: Row, chat: bool) -> Example:
    if isinstance(row.value("prompt"), str):
        return Pair(row.text("prompt"), row.text("completion"))
    prompt, completion = row.turns("prompt", none=True), row.turns("completion")
    return Chat((*prompt, *completion), len(prompt), row.values.get("tools"))


def _read_messages(row: Row, chat: bool) -> Example:
    return Chat(row.turns("messages"), tools=row.values.get("tools"))


def _read_conversations(row: Row, chat: bool) -> Example:
    system = _system(row)
    return Chat((*system, *row.turns("conversations")), tools=row.values.get("tools"))


def _read_instruction(row: Row, chat: bool) -> Example:
    instruction, more, output = row.text("instruction"), row.optional("input"), row.text("output")
    if not chat:
        head, middle = (_ALPACA_INPUT, f"\n\n### Input:\n{more}") if more else (_ALPACA, "")
        head = row.optional("system") or head
        return Pair(f"{head}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:\n", output)
    if not output.strip():
        return Pair(instruction, "")
    request = f"{instruction}\n\n{more}" if more else instruction
    return Chat((*_system(row), {"role": "user", "content": request}, {"role": "assistant", "content": output}))


def _system(row: Row) -> tuple[Mapping[str, Any], ...]:
    text = row.optional("system")
    return ({"role": "system", "content": text},) if text else ()


FORMS = (
    Form("messages", ("messages",), _read_messages, ("tools",)),
    Form("prompt and completion", ("prompt", "completion"), _read_pair, ("tools",)),
    Form("conversations", ("conversations",), _read_conversations, ("system", "tools")),
    Form("instruction and output", ("instruction", "output"), _read_instruction, ("input", "system")),
    Form("text", ("text",), _read_text),
)
_EXPECTED = "prompt and completion, messages, text, instruction and output, conversations, or input_ids"
NAMES = tuple(dict.fromkeys(name for form in FORMS for name in (*form.needs, *form.may)))
"""Columns that the forms read; what ``columns`` may map."""


def row_of(value: Any, number: int, columns: Mapping[str, str]) -> Row:
    """A row of a notebook: a dictionary, a text, or a prompt and completion.

    Raises:
        TrainingError: it is none of them.
    """
    if isinstance(value, str):
        return Row({"text": value}, number)
    if _is_pair(value):
        return Row({"prompt": value[0], "completion": value[1]}, number)
    if not isinstance(value, Mapping):
        raise TrainingError(f"Row {number} is {with_article(value)}, not a dictionary with {_EXPECTED}.", index=number)
    return Row(value, number, columns)


def keys_of(value: Any) -> tuple[str, ...]:
    """The columns of a first row.

    Raises:
        TrainingError: it is not a row.
    """
    return tuple(map(str, row_of(value, 0, {}).values))


def form_of(columns: Sequence[str], mapping: Mapping[str, str]) -> Form | None:
    """The form of rows with these columns; None for rows that are tokenised.

    Args:
        columns: of the rows.
        mapping: name in a form -> column; forms that use it come before all others.

    Raises:
        TrainingError: there is no such form; the message names what was found and the nearest.
    """
    there = {*columns, *mapping}
    if TOKENISED in there and (not mapping or TOKENISED in mapping):
        return None
    for form in FORMS:
        if there.issuperset(form.needs) and (not mapping or not mapping.keys().isdisjoint((*form.needs, *form.may))):
            return form
    raise TrainingError(f"Expected columns {_EXPECTED}; found {listed(columns)}.{_hint(columns)}", columns=columns)


def checked_columns(mapping: Any, columns: Sequence[str]) -> dict[str, str]:
    """The mapping of columns, without those that are called alike.

    Args:
        mapping: name in a form -> column, or None.
        columns: those there are.

    Raises:
        TrainingError: a name is not one of a form's, or a column is not there.
    """
    if mapping is None:
        return {}
    known = (*NAMES, TOKENISED, "labels")
    if not isinstance(mapping, Mapping):
        raise TrainingError(f"columns must be a dictionary like {{'prompt': 'question'}}, not {mapping!r:.60}")
    for name, column in mapping.items():
        if name not in known:
            turned = column in known and name in columns
            hint = f" The other way round: {column}={name}." if turned else did_you_mean(str(name), known)
            raise TrainingError(f"columns: {name!r:.40} is none of {', '.join(known)}.{hint}")
        if column not in columns:
            near = did_you_mean(str(column), columns)
            raise TrainingError(f"columns: the rows have no {column!r:.40}, but {listed(columns)}.{near}")
    return {name: column for name, column in mapping.items() if name != column}


def check_roles(row: int, chat: Chat, template: str) -> None:
    """Refuses a role that neither templates in general nor this one know.

    Raises:
        TrainingError: names the row and the message.
    """
    for place, message in enumerate(chat.messages):
        role = message["role"]
        if role not in _TEMPLATE_ROLES and role not in template:
            hint = f" Did you mean {_ROLES[role]!r}?" if role in _ROLES else _known_roles(role, _TEMPLATE_ROLES)
            raise TrainingError(f"Row {row}: message {place} has the role {role!r:.40}.{hint}", index=row)


def is_empty_cell(value: Any) -> bool:
    """Whether a value stands for nothing: None, or the NaN of a table."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def listed(names: Iterable[Any]) -> str:
    """Names for a person."""
    names = [str(name) for name in names]
    return ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "") if names else "no columns"


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _known_roles(role: str, known: Iterable[str]) -> str:
    known = list(dict.fromkeys(known))
    return did_you_mean(role, known) or f" Known: {', '.join(known)}."


def _hint(columns: Sequence[str]) -> str:
    """A mapping that would do, or the nearest names."""
    lower = {column.lower(): column for column in columns}
    prompt = next((lower[name] for name in _PROMPTS if name in lower), None)
    completion = next((lower[name] for name in _COMPLETIONS if name in lower and lower[name] != prompt), None)
    if prompt and completion:
        return f" Say which is which: columns={{'prompt': {prompt!r:.40}, 'completion': {completion!r:.40}}}."
    known = (*NAMES, TOKENISED, "labels")
    return next((hint for column in columns if (hint := did_you_mean(column, known))), "")
