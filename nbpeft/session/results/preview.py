"""The preview of ``add``: what it would do, without changing anything."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.display.blocks import Block, Card, Table, bold, card, dim, line, notes
from nbpeft.display.models import with_notes
from nbpeft.display.numbers import NONE, count, plural, share, size
from nbpeft.errors import few
from nbpeft.session.results.base import NotedResult
from nbpeft.session.results.planning import PlanResult


@dataclass(frozen=True)
class PreviewRow:
    """Targets of one kind in a preview.

    Attributes:
        target: last component of their paths.
        module_count: number of modules.
        shapes: distinct shapes ``out × in``.
        ranks: distinct ranks.
        parameter_count: number of the new adapter's parameters on them.
        backend: how their weights are stored.
    """

    target: str
    module_count: int
    shapes: tuple[str, ...]
    ranks: tuple[int, ...]
    parameter_count: int
    backend: str


@dataclass(frozen=True, repr=False)
class Preview(NotedResult):
    """What ``add`` would do; nothing was changed.

    Attributes:
        model_name: the notebook variable of the model.
        name: name of the adapter.
        method: display name of the method.
        rows: the targets, by the last component of their paths.
        copies: modules that would be trained as a whole.
        excluded_count: number of modules that the config excludes.
        missing: target patterns that match nothing.
        parameter_count: number of parameters that the new adapter trains.
        base_count: number of parameters of the model.
        byte_count: size of the adapter's parameters in bytes.
        frozen_bytes: size in bytes of the frozen tensors that its layers share.
        training_bytes: size of gradients and AdamW's two moments in bytes.
        replaces: whether an adapter with this name would be reconfigured.
        memory: the forecast for training, or why there is none.
    """

    model_name: str
    name: str
    method: str
    rows: tuple[PreviewRow, ...]
    copies: tuple[str, ...]
    excluded_count: int
    missing: tuple[str, ...]
    parameter_count: int
    base_count: int
    byte_count: int
    training_bytes: int
    replaces: bool = False
    memory: PlanResult | str = ""
    frozen_bytes: int = 0

    @property
    def module_count(self) -> int:
        """Number of modules that would be adapted, or trained as a whole."""
        return sum(row.module_count for row in self.rows) + len(self.copies)

    def __str__(self) -> str:
        return with_notes(f"dry run: {self.what()}; nothing was changed", self.all_notes()) + self.forecast_text()

    def what(self) -> str:
        """Returns what would be adapted, as text."""
        where = ", ".join((*(row.target for row in self.rows), *self.copies))
        return (
            f"{self.method} {self.name!r} would {'reconfigure' if self.replaces else 'adapt'} "
            f"{plural(self.module_count, 'module')} of {self.model_name} ({where}); "
            f"{count(self.parameter_count)} parameters, {size(self.byte_count)}"
        )

    def forecast_text(self) -> str:
        """Returns the forecast as additional lines of text."""
        if isinstance(self.memory, PlanResult):
            return f"\nforecast: {self.memory}"
        return f"\nno forecast: {self.memory}" if self.memory else ""

    def all_notes(self) -> tuple[str, ...]:
        """Returns the notes, and a message about patterns that match nothing."""
        missing = (f"nothing matches {few(self.missing)}",) if self.missing else ()
        return (*missing, *self.notes)

    def view(self) -> Card:
        title = f"{self.name}: dry run, nothing was changed"
        return card(title, self.blocks(), aside=f"{self.model_name}, {self.method}")

    def blocks(self) -> tuple[Block, ...]:
        """Shows the preview without its frame."""
        rows = tuple(
            (
                row.target,
                count(row.module_count),
                ", ".join(row.shapes),
                ", ".join(map(str, row.ranks)) or NONE,
                count(row.parameter_count),
                row.backend,
            )
            for row in self.rows
        )
        total = (
            f"{count(self.parameter_count)} parameters on {count(self.base_count)} "
            f"({share(self.parameter_count, self.base_count)}); {size(self.byte_count)} for the adapter, "
            f"{size(self.training_bytes)} more for gradients and AdamW while training"
        )
        total += f"; {size(self.frozen_bytes)} of frozen tensors that its layers share" if self.frozen_bytes else ""
        whole = f"whole modules: {', '.join(self.copies)}" if self.copies else ""
        excluded = f"{plural(self.excluded_count, 'module')} excluded" if self.excluded_count else ""
        return (
            Table(("Target", "Modules", "out × in", "Rank", "Parameters", "Stored"), rows, right=(1, 3, 4)),
            *(line(dim(text)) for text in (total, whole, excluded)),
            *notes(self.all_notes()),
            *self._forecast(),
        )

    def _forecast(self) -> tuple[Block, ...]:
        if isinstance(self.memory, PlanResult):
            assumed = f" ({'; '.join(self.memory.notes)})" if self.memory.notes else ""
            return (line(bold("memory"), dim(f"training, {self.memory.settings}{assumed}")), *self.memory.blocks())
        return (line(dim(f"no forecast of memory: {self.memory}")),) if self.memory else ()
