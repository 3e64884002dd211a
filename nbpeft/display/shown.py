"""The base class of results, which a notebook shows as HTML and a terminal as text."""

from __future__ import annotations

import functools
from typing import Any

from nbpeft.display.blocks import Block, Card
from nbpeft.errors import visible
from nbpeft.jsonable import AsDict


class Shown(AsDict):
    """A result that is shown as HTML in a notebook, as a card by rich, and as ``str`` in a terminal.

    Subclasses override ``view`` for the content and ``__str__`` for the plain text. Control characters in either, of
    names and labels that come from files, are shown and not obeyed.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__str__" in vars(cls):
            own = cls.__str__
            cls.__str__ = functools.wraps(own)(lambda self: visible(own(self)))  # type: ignore[method-assign]

    def view(self) -> Block:
        """Returns the content as a block."""
        return Card(str(self))

    def displayed(self) -> None:
        """Called when a notebook or a terminal shows the result."""

    def __str__(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self) -> Any:
        from nbpeft.display.text import renderable

        return renderable(self.view())

    def _repr_html_(self) -> str:
        from nbpeft.display.html import to_html

        self.displayed()
        return to_html(self.view())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        self.displayed()
        printer.text("..." if cycle else repr(self))
