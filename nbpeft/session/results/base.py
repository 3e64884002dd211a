"""The base classes of results: frozen data that describes itself, and releases its model after it was displayed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import Block, Card, Line, Text, card, line, notes
from nbpeft.display.models import adapter_table, model_title, with_notes
from nbpeft.display.shown import Shown
from nbpeft.errors import AdapterError

if TYPE_CHECKING:
    from nbpeft.model import PeftModel


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """Base of all results: a line of text in a terminal, a card in a notebook."""


@dataclass(frozen=True, repr=False)
class NotedResult(Result):
    """Base of results with notes. Subclasses override ``_what`` for the text without them.

    Attributes:
        notes: messages for the user.
    """

    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def _what(self) -> str:
        """Returns what was done, as text."""
        raise NotImplementedError

    def __str__(self) -> str:
        return with_notes(self._what(), self.notes)


class RecordResult(NotedResult):
    """Base of results that show a record of the engine; the record's attributes are also attributes of the result."""

    _RECORD: ClassVar[str]
    """Name of the field with the record."""

    def __getattr__(self, name: str) -> Any:
        if name == self._RECORD or name.startswith("__"):  # while the object is being unpickled
            raise AttributeError(name)
        record = getattr(self, self._RECORD)
        if name.startswith("_") or not hasattr(record, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return getattr(record, name)

    def __dir__(self) -> list[str]:
        public = (name for name in dir(getattr(self, self._RECORD)) if not name.startswith("_"))
        return sorted({*super().__dir__(), *public})


@dataclass(frozen=True, repr=False)
class LineResult(Result):
    """A command that only reports what it did.

    Attributes:
        line: what was done, as text.
    """

    line: str

    def __str__(self) -> str:
        return self.line


class Notice(LineResult):
    """A message for the user before a command, e.g. that a variable refers to another model now."""

    def view(self) -> Line:
        return line(Text(self.line, "warning"))


@dataclass(frozen=True, repr=False)
class TracebackResult(Result):
    """The traceback of the last command that failed.

    Attributes:
        text: the traceback as printed by Python; empty if no command has failed.
    """

    text: str

    def __str__(self) -> str:
        return self.text or "no command has failed yet"

    def view(self) -> Card:
        return card("traceback", line(Text(str(self), "code", wrap="as is")))


class ModelRef:
    """A reference to a model that is strong until it is released, and weak afterwards.

    Args:
        model: the model.
        rehandle: returns the model again if its PeftModel was deleted.
    """

    __slots__ = ("_model", "_reference", "_rehandle")

    def __init__(self, model: Any, rehandle: Callable[[], Any] = lambda: None) -> None:
        self._model: Any = model
        self._reference = weakref.ref(model)
        self._rehandle = rehandle

    def get(self, what: str) -> Any:
        """Returns the model.

        Raises:
            AdapterError: it no longer exists.
        """
        model = self._model if self._model is not None else self._reference() or self._rehandle()
        if model is None:
            raise AdapterError(f"the {what} of this result is gone: nothing else holds it")
        return model

    def release(self) -> None:
        """Makes the reference weak."""
        self._model = None


@dataclass(frozen=True, repr=False)
class ModelResult(NotedResult):
    """A result that returns a model; in a notebook's ``Out`` it references the model weakly.

    Attributes:
        reference: reference to the model.
    """

    reference: ModelRef = field(compare=False)

    @property
    def model(self) -> PeftModel:
        """The adapted model.

        Raises:
            AdapterError: the result was displayed or released, and nothing else references the model.
        """
        model: PeftModel = self.reference.get("model")
        return model

    def release(self) -> None:
        """Releases the reference to the model, as displaying the result does."""
        self.reference.release()

    def displayed(self) -> None:
        """Releases the model."""
        self.release()


def adapter_card(did: str, result: Any, *blocks: Block | tuple[Block, ...] | None) -> Card:
    """Returns a card about one adapter of a model."""
    title, aside = f"{result.adapter.name}: {did}", model_title(result.state)
    return card(title, adapter_table((result.adapter,)), *blocks, notes(result.notes), aside=aside)
