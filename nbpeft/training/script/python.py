"""Values as Python source, formatted as ruff and black format it, whatever line length they are set to."""

from __future__ import annotations

import ast
from typing import Any

_WIDTH = 80


def is_literal(value: Any) -> bool:
    """Whether the text of a value gives it back."""
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def source_of(value: Any, indent: int = 0, used: int = 0) -> str:
    """A literal; dictionaries, and lists that are long, with one item a line.

    Args:
        value: in types that literals have.
        indent: of the line that it begins on.
        used: characters before it on that line.
    """
    if isinstance(value, str):
        return _quoted(value)
    if not isinstance(value, dict | list) or not value:
        return repr(value)
    inside = " " * (indent + 4)
    if isinstance(value, dict):
        keys = [f"{source_of(key)}: " for key in value]
        items = [
            f"{key}{source_of(item, indent + 4, indent + 4 + len(key))}"
            for key, item in zip(keys, value.values(), strict=True)
        ]
    else:
        items = [source_of(item, indent + 4, indent + 4) for item in value]
        line = f"[{', '.join(items)}]"
        if "\n" not in line and used + len(line) <= _WIDTH:
            return line
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    return "".join([opened, "\n", *(f"{inside}{item},\n" for item in items), " " * indent, closed])


def call(function: str, arguments: list[str], indent: int = 0) -> str:
    """A call with one argument a line."""
    inside = " " * (indent + 4)
    return "".join([f"{function}(\n", *(f"{inside}{item},\n" for item in arguments), " " * indent, ")"])


def _quoted(text: str) -> str:
    found = repr(text)
    if found[0] == '"' or '"' in text:
        return found
    return f'"{found[1:-1]}"'
