"""Collapses repeated warnings of bitsandbytes and transformers within each cell of the notebook."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from nbpeft._util.logs import collapsed


def install(shell: Any) -> Callable[[], None]:
    """Open a ``collapsed()`` block when a cell begins and close it when it ends.

    Cells may be nested (``get_ipython().run_cell``). A cell that began before the installation has no block.

    Returns:
        A function that uninstalls it.
    """
    blocks: list[ExitStack] = []

    def begin(*_: Any) -> None:
        block = ExitStack()
        block.enter_context(collapsed())
        blocks.append(block)

    def end(*_: Any) -> None:
        if blocks:
            blocks.pop().close()

    def remove() -> None:
        shell.events.unregister("pre_run_cell", begin)
        shell.events.unregister("post_run_cell", end)
        while blocks:
            end()

    shell.events.register("pre_run_cell", begin)
    shell.events.register("post_run_cell", end)
    return remove
