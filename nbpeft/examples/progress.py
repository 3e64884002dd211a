"""A progress line: updated in place, and plain text in a saved notebook."""

from __future__ import annotations

import importlib
import sys
from types import TracebackType
from typing import Any


class Progress:
    """A line such as ``base model: 32 of 48``; in a terminal it is overwritten, in a file it is left out.

    Args:
        label: name of the operation.
        total: number of items.
        show: whether to show it.
    """

    def __init__(self, label: str, total: int, *, show: bool = True) -> None:
        self._label, self._total, self._finished = label, total, 0
        self._notebook = show and _in_notebook()
        self._terminal = show and not self._notebook and sys.stderr.isatty()
        self._handle: Any = None

    def __enter__(self) -> Progress:
        self._write(f"{self._label}: 0 of {self._total}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            print(file=sys.stderr)

    def advance(self, number: int) -> None:
        """Adds to the number of finished items."""
        self._finished += number
        self._write(f"{self._label}: {self._finished} of {self._total}")

    def done(self, text: str) -> None:
        """Replaces the line by a final text."""
        self._write(text)

    def _write(self, text: str) -> None:
        if self._terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif self._notebook:
            display: Any = importlib.import_module("IPython.display").display
            data = {"text/plain": text}
            if self._handle is None:
                self._handle = display(data, raw=True, display_id=True)
            else:
                self._handle.update(data, raw=True)


def _in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return getattr(running, "kernel", None) is not None
