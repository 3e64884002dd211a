"""Allows cell magics without a body, which IPython refuses before it calls the magic."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

_HEAD = re.compile(r"%%(\w+)(?![\w?])")


def install(shell: Any, names: Collection[str]) -> Callable[[], None]:
    """Give these cell magics an empty line as their body if they have none.

    Returns:
        A function that uninstalls it.
    """

    def with_body(lines: list[str]) -> list[str]:
        head = _HEAD.match(lines[0]) if lines else None
        if head is None or head[1] not in names or "".join(lines[1:]).strip() or lines[0].rstrip().endswith("?"):
            return lines
        return [lines[0].rstrip("\n") + "\n", "\n"]

    # Otherwise IPython in a terminal would run this while the cell is being typed, and take its first line as complete.
    with_body.has_side_effects = True  # type: ignore[attr-defined]
    transformers = shell.input_transformers_cleanup
    transformers.append(with_body)

    def remove() -> None:
        transformers[:] = [item for item in transformers if item is not with_body]

    return remove
