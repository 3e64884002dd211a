"""Shift+Tab on a field, a verb or an option: one line of what it means, its type, default and values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from nbpeft.errors import few
from nbpeft.magics.complete import HELP, chosen_method
from nbpeft.magics.help import argument_help, command_help
from nbpeft.magics.parse import Subcommand
from nbpeft.session.fields import Field

_WORD = re.compile(r"[\w-]+")
_STATEMENT = re.compile(r"\s*([^\W\d]\w*)\s*=")
_SHOWN = 24
"""Values that are listed."""

Fields = Callable[[str, str], Mapping[str, Field]]
"""(kind of fields, method) -> the fields by name."""


def describe(
    text: str, cursor: int, subcommands: Mapping[str, Subcommand], cells: Mapping[str, Subcommand], fields: Fields
) -> str | None:
    """What stands at a place of a cell; None where it is nothing of these magics.

    Args:
        text: the whole cell.
        cursor: offset in it.
        subcommands: subcommands of ``%lora``.
        cells: cell magics.
        fields: says what the fields are.
    """
    start = text.rfind("\n", 0, cursor) + 1
    line = text[start:].partition("\n")[0]
    head = re.match(r"\s*%%(\w+)", text)
    column = cursor - start
    word = next((found[0] for found in _WORD.finditer(line) if found.start() <= column <= found.end()), "")
    method = chosen_method(text)
    if head is not None and head[1] in cells:
        command = cells[head[1]]
        if start:
            return _in_body(text[:cursor].split("\n")[1:], word, fields(command.fields, method))
        return _in_line(command, f"%%{command.name}", word, line, fields(command.fields, method))
    magic = re.match(r"\s*%lora\s+(?:help\s+)?(\w+)", line)
    if magic is None or magic[1] == HELP or magic[1] not in subcommands:
        return None
    command = subcommands[magic[1]]
    return _in_line(command, f"%lora {command.name}", word, line, fields(command.fields, method))


def _in_line(command: Subcommand, prog: str, word: str, line: str, known: Mapping[str, Field]) -> str:
    item = next((item for item in command.arguments if word in item.flags), None)
    if item is not None and not item.positional:
        return argument_help(item)
    if word in known and re.search(rf"\b{re.escape(word)}=", line):
        return field_text(known[word])
    return str(command_help(command, prog))


def _in_body(lines: list[str], word: str, known: Mapping[str, Field]) -> str | None:
    """The field at the cursor, or else the one whose value the cursor is in."""
    if word in known:
        return field_text(known[word])
    statements = (found[1] for line in reversed(lines) if (found := _STATEMENT.match(line)))
    name = next(statements, "")
    return field_text(known[name]) if name in known else None


def field_text(field: Field) -> str:
    """A field as a person reads it."""
    kind = f": {field.kind}" if field.kind else ""
    default = f" = {field.default}" if field.default else ""
    values = [repr(value) for value in field.choices]
    if field.modules:
        values.append("names of the model's layers")
    some = few(values, _SHOWN, quoted=False)
    return "\n".join(filter(None, (f"{field.name}{kind}{default}", field.help, some and f"Values: {some}")))


def install(shell: Any, describes: Callable[[str, int], str | None]) -> Callable[[], None]:
    """Let the kernel answer for what is described; returns the function that removes it.

    IPython is only asked about a name, without the cell that it stands in; the kernel knows both.
    """
    kernel = getattr(shell, "kernel", None)
    original = getattr(kernel, "do_inspect", None)
    if original is None:
        return lambda: None

    def do_inspect(code: str, cursor_pos: int, *args: Any, **options: Any) -> Any:
        text = describes(code, cursor_pos)
        if text is None:
            return original(code, cursor_pos, *args, **options)
        return {"status": "ok", "found": True, "data": {"text/plain": text}, "metadata": {}}

    kernel.do_inspect = do_inspect  # type: ignore[union-attr]

    def remove() -> None:
        if vars(kernel).get("do_inspect") is do_inspect:
            del kernel.do_inspect  # type: ignore[union-attr]

    return remove
