"""What commands return: one frozen object each, a line in a terminal and a card in a notebook.

A result never keeps a tensor alive once it was shown: what a notebook keeps in ``Out`` is
numbers and names.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from nbpeft.errors import AdapterError
from nbpeft.session import render
from nbpeft.session.describe import acting, adapter_table, condition, describe, model_card, trainable, with_notes
from nbpeft.state import AdapterState, MemoryState, ModelState, SessionState

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.model import PeftModel


@dataclass(frozen=True, repr=False)
class Result:
    """Base of all results: the text of a terminal is ``str``, that of a notebook HTML."""

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return type(self).__name__

    def _html(self) -> str:
        return render.card(str(self))

    def _repr_html_(self) -> str:
        return self._html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("..." if cycle else repr(self))


class ModelRef:
    """Holds a model until it is released, then finds it again as long as anything else holds it."""

    __slots__ = ("_held", "_reference", "_rehandle")

    def __init__(self, held: Any, rehandle: Callable[[], Any] = lambda: None) -> None:
        self._held: Any = held
        self._reference = weakref.ref(held)
        self._rehandle = rehandle

    def get(self, what: str) -> Any:
        """The model.

        Raises:
            AdapterError: it is gone.
        """
        found = self._held if self._held is not None else self._reference() or self._rehandle()
        if found is None:
            raise AdapterError(f"the {what} of this result is gone: nothing else holds it")
        return found

    def release(self) -> None:
        """From now on holds weakly."""
        self._held = None


@dataclass(frozen=True, repr=False)
class _ModelResult(Result):
    """A result that hands an object over, strongly until a notebook shows it."""

    holder: ModelRef = field(compare=False)

    def release(self) -> None:
        """Keeps the object no longer alive. Showing the result in a notebook does it, too."""
        self.holder.release()

    def _repr_html_(self) -> str:
        self.release()
        return self._html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        self.release()
        super()._repr_pretty_(printer, cycle)


@dataclass(frozen=True, repr=False)
class AddResult(_ModelResult):
    """An adapter was configured and applied.

    Attributes:
        model_name: the notebook variable of the model.
        adapter: the adapter as it is now.
        state: the model as it is now.
        reconfigured: whether it replaced an adapter of the same name.
        unchanged: whether the same adapter was there already, so that nothing was done.
        plan: what was adapted (no tensors); None where ``unchanged``.
        notes: what a person should know.
    """

    model_name: str
    adapter: AdapterState
    state: ModelState
    reconfigured: bool = False
    unchanged: bool = False
    plan: Any = field(default=None, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> PeftModel:
        """The adapted model.

        Raises:
            AdapterError: the result was shown or released, and nothing else holds the model.
        """
        found: PeftModel = self.holder.get("model")
        return found

    def __str__(self) -> str:
        if self.unchanged:
            line = f"{self.adapter.name!r} on {self.model_name} is set up like this already; nothing changed"
        else:
            did = "reconfigured" if self.reconfigured else "added"
            line = (
                f"{did} {self.adapter.name!r} on {self.model_name}: {describe(self.adapter)}; {trainable(self.state)}"
            )
        return with_notes(line, self.notes)

    def _html(self) -> str:
        did = (
            "already set up like this, nothing changed"
            if self.unchanged
            else ("reconfigured" if self.reconfigured else "added")
        )
        return render.card(
            f"{self.adapter.name} · {did}",
            adapter_table((self.adapter,)),
            render.line(render.dim(trainable(self.state))),
            render.notes(self.notes),
            aside=f"{self.model_name} · {self.state.class_name}",
        )


@dataclass(frozen=True, repr=False)
class CommandResult(Result):
    """A command was carried out.

    Attributes:
        line: what was done.
        state: the model as it is now.
        notes: what a person should know.
    """

    line: str
    state: ModelState
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return with_notes(self.line, self.notes)

    def _html(self) -> str:
        return render.card(
            self.line,
            render.line(render.dim(f"{acting(self.state)}; {trainable(self.state)}")),
            render.notes(self.notes),
            aside=f"{self.state.name} · {self.state.class_name}",
        )


@dataclass(frozen=True, repr=False)
class LoadResult(_ModelResult):
    """An adapter was loaded.

    Attributes:
        model_name: the notebook variable of the model.
        source: folder or hub id it came from.
        adapter: the adapter as it is now.
        state: the model as it is now.
        notes: what a person should know, e.g. that the checkpoint names no base.
    """

    model_name: str
    source: str
    adapter: AdapterState
    state: ModelState
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> PeftModel:
        """The adapted model.

        Raises:
            AdapterError: the result was shown or released, and nothing else holds the model.
        """
        found: PeftModel = self.holder.get("model")
        return found

    def __str__(self) -> str:
        line = f"loaded {self.adapter.name!r} on {self.model_name} from {self.source}: {describe(self.adapter)}"
        if not self.adapter.active:
            line += "; it is not active"
        return with_notes(line, self.notes)

    def _html(self) -> str:
        return render.card(
            f"{self.adapter.name} · loaded",
            adapter_table((self.adapter,)),
            render.line(render.dim(f"from {self.source}; {acting(self.state)}")),
            render.notes(self.notes),
            aside=f"{self.model_name} · {self.state.class_name}",
        )


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter on disk.

    Attributes:
        name: the adapter.
        folder: where its files are.
        files: their names.
        byte_count: their size.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    byte_count: int


@dataclass(frozen=True, repr=False)
class SaveResult(Result):
    """Adapters were saved.

    Attributes:
        model_name: the notebook variable of the model.
        saved: what was written.
    """

    model_name: str
    saved: tuple[SavedAdapter, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{item.name!r} to {item.folder} ({render.size(item.byte_count)})" for item in self.saved]
        return with_notes("saved " + ", ".join(parts), self.notes)

    def _html(self) -> str:
        rows = [
            (
                render.name_or_path(item.name),
                render.name_or_path(item.folder),
                escape(", ".join(item.files)),
                render.size(item.byte_count),
            )
            for item in self.saved
        ]
        return render.card(
            "saved",
            render.table(("Adapter", "Folder", "Files", "Size"), rows, right=(3,)),
            render.notes(self.notes),
            aside=self.model_name,
        )


@dataclass(frozen=True, repr=False)
class ExportResult(Result):
    """A script was written.

    Attributes:
        script: its path.
        adapter: the adapter it trains.
        data: path and number of rows of each file beside it.
        notes: what a person should know.
    """

    script: str
    adapter: str
    data: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = " and ".join(f"{render.plural(count, 'row')} in {path}" for path, count in self.data)
        line = f"wrote {self.script}, which trains {self.adapter!r} anew, and {rows}; accelerate launch {self.script}"
        return with_notes(line, self.notes)


@dataclass(frozen=True, repr=False)
class UnloadResult(_ModelResult):
    """The adapters are gone and the base model is back.

    Attributes:
        model_name: the notebook variable of the model.
        names: the adapters that were there.
        merged: whether their deltas are in the base weights now.
    """

    model_name: str
    names: tuple[str, ...]
    merged: bool = False
    notes: tuple[str, ...] = ()

    @property
    def base(self) -> nn.Module:
        """The base model.

        Raises:
            AdapterError: the result was shown or released, and nothing else holds the model.
        """
        found: nn.Module = self.holder.get("base model")
        return found

    def __str__(self) -> str:
        how = "merged into the base and unloaded" if self.merged else "unloaded"
        return with_notes(f"{how}: {render.names(self.names)}; {self.model_name} is the base model again", self.notes)

    def _html(self) -> str:
        return render.card(str(dataclasses.replace(self, notes=())), render.notes(self.notes), aside=self.model_name)


@dataclass(frozen=True, repr=False)
class StatusReport(Result):
    """The state of things.

    Attributes:
        state: of the session, or of one model of it.
    """

    state: SessionState

    def __str__(self) -> str:
        if not self.state.models:
            return "no adapted model yet"
        blocks = []
        for model in self.state.models:
            head = f"{model.name} · {model.class_name} · {acting(model)}; {trainable(model)}"
            rows = [
                (
                    item.name,
                    item.method,
                    f"r={item.rank} alpha={item.alpha:g}",
                    render.count(item.parameter_count),
                    condition(item),
                )
                for item in model.adapters
            ]
            blocks.append("\n".join(part for part in (head, render.columns(rows)) if part))
        return "\n".join(blocks + ([f"busy: {self.state.busy}"] if self.state.busy else []))

    def _html(self) -> str:
        if not self.state.models:
            return render.card(str(self))
        return '<div style="height:10px"></div>'.join(model_card(model) for model in self.state.models)


@dataclass(frozen=True, repr=False)
class MemoryReport(Result):
    """What a model uses, by part."""

    memory: MemoryState

    def __str__(self) -> str:
        parts = [f"{part.name} {render.size(part.byte_count)}" for part in self.memory.parts]
        return f"memory on {self.memory.device}: {', '.join(parts)}{self._free()}"

    def _free(self) -> str:
        if self.memory.device_free is None or self.memory.device_total is None:
            return ""
        return f"; {render.size(self.memory.device_free)} free of {render.size(self.memory.device_total)}"

    def _html(self) -> str:
        rows = [
            (escape(part.name), render.size(part.byte_count), render.dim(part.detail)) for part in self.memory.parts
        ]
        peak = f"peak {render.size(self.memory.peak)}" if self.memory.peak is not None else ""
        free = self._free().removeprefix("; ")
        return render.card(
            "memory",
            render.table(("Part", "Size", ""), rows, right=(1,)),
            render.line(render.dim("; ".join(text for text in (peak, free) if text))),
            aside=self.memory.device,
        )
