"""Results of adding, loading, saving and unloading adapters, and the session's status."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from nbpeft.display.blocks import Block, Card, Stack, Table, Text, card, dim, line, notes
from nbpeft.display.memory import free_words, parts_text
from nbpeft.display.models import (
    activity,
    adapter_table,
    condition,
    describe,
    model_card,
    model_title,
    settings,
    trainable,
    training_now,
)
from nbpeft.display.numbers import count, size
from nbpeft.errors import few
from nbpeft.session.results.base import ModelResult, NotedResult, Result, adapter_card
from nbpeft.state import AdapterState, MemoryState, ModelState, SessionState

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, repr=False)
class AddResult(ModelResult):
    """An adapter was configured and applied.

    Attributes:
        model_name: the notebook variable of the model.
        adapter: state of the adapter after the command.
        state: state of the model after the command.
        reconfigured: whether it replaced an adapter with the same name.
        unchanged: whether the same adapter already existed, so that nothing was done.
        plan: the injection plan, which has no tensors; None if ``unchanged``.
        others: the other adapters of a sweep.
    """

    model_name: str
    adapter: AdapterState
    state: ModelState
    reconfigured: bool = False
    unchanged: bool = False
    plan: Any = field(default=None, compare=False)
    others: tuple[AdapterState, ...] = ()

    @property
    def did(self) -> str:
        """``added``, ``reconfigured`` or ``unchanged``."""
        return "unchanged" if self.unchanged else "reconfigured" if self.reconfigured else "added"

    def _what(self) -> str:
        if self.others:
            names = ", ".join(item.name for item in (self.adapter, *self.others))
            return f"{self.did} {names} on {self.model_name}; {trainable(self.state)}"
        where = f"{self.adapter.name!r} on {self.model_name}"
        if self.unchanged:
            return f"{where} is set up like this already; nothing changed"
        return f"{self.did} {where}: {describe(self.adapter)}; {trainable(self.state)}"

    def view(self) -> Card:
        did = "already set up like this, nothing changed" if self.unchanged else self.did
        if self.others:
            table = adapter_table((self.adapter, *self.others))
            title = f"{1 + len(self.others)} adapters: {did}"
            learned = line(dim(trainable(self.state)))
            return card(title, table, learned, notes(self.notes), aside=model_title(self.state))
        return adapter_card(did, self, line(dim(trainable(self.state))))


@dataclass(frozen=True, repr=False)
class CommandResult(NotedResult):
    """A command was executed.

    Attributes:
        line: what was done, as text.
        state: state of the model after the command.
    """

    line: str
    state: ModelState

    def _what(self) -> str:
        return self.line

    def view(self) -> Card:
        words = f"{activity(self.state)}; {trainable(self.state)}"
        return card(self.line, line(dim(words)), notes(self.notes), aside=model_title(self.state))


@dataclass(frozen=True, repr=False)
class RestoreResult(ModelResult):
    """Adapters of a model that no longer exists were restored on another one.

    Attributes:
        model_name: the notebook variable of the other model.
        line: what was done, as text.
        state: state of the model after the command.
    """

    model_name: str
    line: str
    state: ModelState

    def _what(self) -> str:
        return self.line

    def view(self) -> Card:
        return card(self.line, adapter_table(self.state.adapters), notes(self.notes), aside=model_title(self.state))


@dataclass(frozen=True, repr=False)
class LoadResult(ModelResult):
    """An adapter was loaded.

    Attributes:
        model_name: the notebook variable of the model.
        source: folder or hub id from which it was loaded.
        adapter: state of the adapter after the command.
        state: state of the model after the command.
    """

    model_name: str
    source: str
    adapter: AdapterState
    state: ModelState

    def _what(self) -> str:
        what = f"loaded {self.adapter.name!r} on {self.model_name} from {self.source}: {describe(self.adapter)}"
        return what if self.adapter.active else f"{what}; it is not active"

    def view(self) -> Card:
        return adapter_card("loaded", self, line(dim(f"from {self.source}; {activity(self.state)}")))


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter on disk.

    Attributes:
        name: name of the adapter.
        folder: folder of its files.
        files: names of the files.
        byte_count: total size in bytes.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    byte_count: int


@dataclass(frozen=True, repr=False)
class SaveResult(NotedResult):
    """Adapters were saved.

    Attributes:
        model_name: the notebook variable of the model.
        saved: the saved adapters.
    """

    model_name: str
    saved: tuple[SavedAdapter, ...]

    def _what(self) -> str:
        return "saved " + ", ".join(f"{item.name!r} to {item.folder} ({size(item.byte_count)})" for item in self.saved)

    def view(self) -> Card:
        named = partial(Text, wrap="names")
        rows = tuple(
            (named(item.name), named(item.folder), ", ".join(item.files), size(item.byte_count)) for item in self.saved
        )
        table = Table(("Adapter", "Folder", "Files", "Size"), rows, right=(3,))
        return card("saved", table, notes(self.notes), aside=self.model_name)


@dataclass(frozen=True, repr=False)
class UnloadResult(ModelResult):
    """The adapters were unloaded.

    Attributes:
        model_name: the notebook variable of the model.
        names: names of the unloaded adapters.
        merged: those that are merged into the base weights for good.
    """

    model_name: str
    names: tuple[str, ...]
    merged: tuple[str, ...] = ()

    @property
    def base(self) -> nn.Module:
        """The base model.

        Raises:
            AdapterError: the result was displayed or released, and nothing else references the model.
        """
        base: nn.Module = self.reference.get("base model")
        return base

    def _what(self) -> str:
        merged = f", with {few(self.merged)} merged into its weights" if self.merged else ""
        return f"unloaded: {few(self.names)}; {self.model_name} is the base model again{merged}"

    def view(self) -> Card:
        return card(self._what(), notes(self.notes), aside=self.model_name)


@dataclass(frozen=True, repr=False)
class StatusReport(Result):
    """The status of the session.

    Attributes:
        state: state of the session, or of one of its models.
    """

    state: SessionState

    def __str__(self) -> str:
        if not self.state.models:
            return "\n".join(("no adapted model yet", *self._past()))
        from nbpeft.display.text import columns

        blocks = []
        for model in self.state.models:
            blocks.append(f"{model_title(model)}: {activity(model)}; {trainable(model)}")
            rows = [
                (item.name, item.method, settings(item), count(item.parameter_count), condition(item))
                for item in model.adapters
            ]
            blocks += [columns(rows)] if rows else []
            blocks += [training_now(model)] if training_now(model) else []
        return "\n".join([*blocks, *self._past(), *([f"busy: {self.state.busy}"] if self.state.busy else [])])

    def _past(self) -> tuple[str, ...]:
        """Returns a line for each model that no longer exists and has adapters to restore."""
        return tuple(
            f"{past.name}: gone; undo restores {past.adapters}, trained and not saved" for past in self.state.past
        )

    def view(self) -> Block:
        cards = [model_card(model, hint=training_now(model)) for model in self.state.models] or [model_card(None)]
        return Stack((*cards, *(line(Text(words, "warning")) for words in self._past())))


@dataclass(frozen=True, repr=False)
class MemoryReport(Result):
    """The memory of a model, by part."""

    memory: MemoryState

    def __str__(self) -> str:
        free = free_words(self.memory)
        return f"memory on {self.memory.device}: {parts_text(self.memory.parts)}{f'; {free}' if free else ''}"

    def view(self) -> Card:
        rows = tuple((part.name, size(part.byte_count), dim(part.detail)) for part in self.memory.parts)
        peak = f"peak {size(self.memory.peak)}" if self.memory.peak is not None else ""
        words = "; ".join(text for text in (peak, free_words(self.memory)) if text)
        table = Table(("Part", "Size", ""), rows, right=(1,))
        return card("memory", table, line(dim(words)), aside=self.memory.device)
