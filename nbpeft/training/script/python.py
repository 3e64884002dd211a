"""Values as Python source, in the format of ruff and black, whatever their line length."""

from __future__ import annotations

import ast
from typing import Any

_WIDTH = 80


def is_literal(value: Any) -> bool:
    """Returns whether a value can be read back from its text."""
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def source_of(value: Any, indent: int = 0, used: int = 0) -> str:
    """Returns a literal; dictionaries, and long lists, have one item per line.

    Args:
        value: a value of literal types.
        indent: indentation of its first line.
        used: number of characters before it on that line.
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
    """Returns a call with one argument per line."""
    inside = " " * (indent + 4)
    return "".join([f"{function}(\n", *(f"{inside}{item},\n" for item in arguments), " " * indent, ")"])


def _quoted(text: str) -> str:
    found = repr(text)
    if found[0] == '"' or '"' in text:
        return found
    return f'"{found[1:-1]}"'
