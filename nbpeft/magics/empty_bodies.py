"""Lets a cell magic stand alone: IPython refuses one without a body before it is asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

_HEAD = re.compile(r"%%(\w+)(?![\w?])")


def install(shell: Any, names: Collection[str]) -> Callable[[], None]:
    """Give these cell magics an empty line as their body where they have none; returns the function that stops it.

    Args:
        shell: the IPython shell.
        names: of the cell magics.
    """

    def with_body(lines: list[str]) -> list[str]:
        head = _HEAD.match(lines[0]) if lines else None
        if head is None or head[1] not in names or "".join(lines[1:]).strip() or lines[0].rstrip().endswith("?"):
            return lines
        return [lines[0].rstrip("\n") + "\n", "\n"]

    # Or a terminal would take the first line for a whole cell.
    with_body.has_side_effects = True  # type: ignore[attr-defined]
    transformers = shell.input_transformers_cleanup
    transformers.append(with_body)

    def remove() -> None:
        transformers[:] = [item for item in transformers if item is not with_body]

    return remove
