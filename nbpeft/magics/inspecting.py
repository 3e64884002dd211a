"""Shift+Tab on a field, a command or an option shows its meaning, type, default and values."""

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
"""The greatest number of values listed."""

Fields = Callable[[str, str], Mapping[str, Field]]
"""(kind of fields, method) -> the fields by name."""


def describe(
    text: str, cursor: int, subcommands: Mapping[str, Subcommand], cells: Mapping[str, Subcommand], fields: Fields
) -> str | None:
    """Describes the field, command or option at a position in a cell.

    Args:
        text: the whole cell.
        cursor: offset in the cell, in characters.
        subcommands: subcommands of ``%lora``.
        cells: cell magics.
        fields: returns the fields of a kind and method.

    Returns:
        The description, or None if the position does not belong to these magics.
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
    """The field at the cursor, or else the field whose value contains the cursor."""
    if word in known:
        return field_text(known[word])
    statements = (found[1] for line in reversed(lines) if (found := _STATEMENT.match(line)))
    name = next(statements, "")
    return field_text(known[name]) if name in known else None


def field_text(field: Field) -> str:
    """A field with its type, default, description and values, as text."""
    kind = f": {field.kind}" if field.kind else ""
    default = f" = {field.default}" if field.default else ""
    values = [repr(value) for value in field.choices]
    if field.modules:
        values.append("names of the model's layers")
    some = few(values, _SHOWN, quoted=False)
    return "\n".join(filter(None, (f"{field.name}{kind}{default}", field.help, some and f"Values: {some}")))


def install(shell: Any, describes: Callable[[str, int], str | None]) -> Callable[[], None]:
    """Let the kernel answer inspection requests (Shift+Tab) for these magics.

    IPython's own hook gets only a name, without the cell around it; the kernel's ``do_inspect`` gets both.

    Args:
        shell: the IPython shell.
        describes: (text of the cell, cursor) -> the description, or None.
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
