"""Answers that come while a cell runs, and the panels that compare and blend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from nbpeft.magics.desk import Desk
from nbpeft.magics.tokenizers import usual_tokenizer

PANELS = ("adapters", "compare", "blend", "plan")
"""What ``%lora panel`` shows; the first one without a word."""


@contextlib.contextmanager
def shown_live(desk: Desk) -> Iterator[Callable[[Any], None]]:
    """Gives a function that shows answers so far in the running cell; they go when the block ends."""
    from nbpeft.widgets import LiveAnswers

    live = LiveAnswers(ui=desk.ui)
    try:
        yield live.draw
    finally:
        live.close()


def comparing_panel(desk: Desk, kind: str, name: str | None, **content: Any) -> object:
    """The panel that compares or blends the adapters of a model.

    Args:
        desk: the notebook.
        kind: ``compare`` or ``blend``.
        name: the model; None for the current one.
        **content: what to begin with, e.g. the prompt.

    Raises:
        AdapterError: there is no such model.
    """
    desk.session.model(name)
    from nbpeft.widgets import BlendPanel, ComparePanel

    made = {"compare": ComparePanel, "blend": BlendPanel}[kind]
    return made(desk.session, name, ui=desk.ui, tokenizer=tokenizer_source(desk), **content)


def tokenizer_source(desk: Desk) -> Callable[[], Any]:
    """Where a panel asks for the tokenizer when it needs one, which may be made after the panel."""
    return lambda: usual_tokenizer(desk)
