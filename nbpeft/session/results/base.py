"""What all results share: frozen data that describes itself, and lets go of its model once it was shown."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbpeft.display.blocks import Block, Card, Line, Text, card, line, notes
from nbpeft.display.models import adapter_table, model_title
from nbpeft.display.shown import Shown
from nbpeft.errors import AdapterError

if TYPE_CHECKING:
    from nbpeft.model import PeftModel


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """Base of all results: a line of text in a terminal, a card in a notebook."""


@dataclass(frozen=True, repr=False)
class Notice(Result):
    """What a person should know before a command, e.g. that a variable holds another model now.

    Attributes:
        line: it.
    """

    line: str

    def __str__(self) -> str:
        return self.line

    def view(self) -> Line:
        """The line."""
        return line(Text(self.line, "warning"))


@dataclass(frozen=True, repr=False)
class TracebackResult(Result):
    """The traceback of the last command that failed.

    Attributes:
        text: as Python prints it; empty where none has failed.
    """

    text: str

    def __str__(self) -> str:
        return self.text or "no command has failed yet"

    def view(self) -> Card:
        """The traceback as it is."""
        return card("traceback", line(Text(str(self), "code", wrap="as is")))


class ModelRef:
    """A reference to a model that is strong until it is released, and weak from then on.

    Args:
        model: the model.
        rehandle: gives the model again where nothing else held its handle.
    """

    __slots__ = ("_model", "_reference", "_rehandle")

    def __init__(self, model: Any, rehandle: Callable[[], Any] = lambda: None) -> None:
        self._model: Any = model
        self._reference = weakref.ref(model)
        self._rehandle = rehandle

    def get(self, what: str) -> Any:
        """The model.

        Raises:
            AdapterError: it is gone.
        """
        found = self._model if self._model is not None else self._reference() or self._rehandle()
        if found is None:
            raise AdapterError(f"the {what} of this result is gone: nothing else holds it")
        return found

    def release(self) -> None:
        """From now on holds weakly."""
        self._model = None


@dataclass(frozen=True, repr=False)
class ModelResult(Result):
    """A result that hands a model over; what a notebook keeps in ``Out`` holds it weakly.

    Attributes:
        reference: to the model.
    """

    reference: ModelRef = field(compare=False)

    @property
    def model(self) -> PeftModel:
        """The adapted model.

        Raises:
            AdapterError: the result was shown or released, and nothing else holds the model.
        """
        found: PeftModel = self.reference.get("model")
        return found

    def release(self) -> None:
        """Keeps the model no longer alive. Showing the result does it, too."""
        self.reference.release()

    def displayed(self) -> None:
        """Releases the model."""
        self.release()


def adapter_card(did: str, result: Any, *blocks: Block | tuple[Block, ...] | None) -> Card:
    """What was done with one adapter of one model.

    Args:
        did: what was done, e.g. ``added``.
        result: with the ``adapter``, the ``state`` of its model, and ``notes``.
        *blocks: below the adapter.
    """
    title, aside = f"{result.adapter.name}: {did}", model_title(result.state)
    return card(title, adapter_table((result.adapter,)), *blocks, notes(result.notes), aside=aside)
