"""Collapses equal warnings of bitsandbytes and transformers over a whole cell of the notebook."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from nbpeft.logs import collapsed


class CellLogs:
    """Opens a ``collapsed()`` block when a cell begins and closes it when it ends.

    Cells may be nested (``get_ipython().run_cell``); one that began before this was installed is
    left alone.
    """

    def __init__(self) -> None:
        self._open: list[ExitStack] = []

    def begin(self, *_: Any) -> None:
        """A cell begins."""
        stack = ExitStack()
        stack.enter_context(collapsed())
        self._open.append(stack)

    def end(self, *_: Any) -> None:
        """A cell ends."""
        if self._open:
            self._open.pop().close()

    def close(self) -> None:
        """Ends what is open."""
        while self._open:
            self._open.pop().close()


def install(shell: Any) -> Callable[[], None]:
    """Registers with a shell's events; returns how to take it off again."""
    logs = CellLogs()
    shell.events.register("pre_run_cell", logs.begin)
    shell.events.register("post_run_cell", logs.end)

    def remove() -> None:
        shell.events.unregister("pre_run_cell", logs.begin)
        shell.events.unregister("post_run_cell", logs.end)
        logs.close()

    return remove
