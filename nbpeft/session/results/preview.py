"""What ``add`` would do, counted and shown before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.display.blocks import Block, Card, Table, bold, card, dim, line, notes
from nbpeft.display.models import with_notes
from nbpeft.display.numbers import NONE, count, plural, share, size
from nbpeft.errors import few
from nbpeft.session.results.base import Result
from nbpeft.session.results.planning import PlanResult


@dataclass(frozen=True)
class PreviewRow:
    """Targets of one kind in a preview.

    Attributes:
        target: last segment of their paths.
        module_count: how many modules.
        shapes: distinct ``out × in``.
        ranks: distinct ranks.
        parameter_count: of the new adapter on them.
        backend: how their weights are stored.
    """

    target: str
    module_count: int
    shapes: tuple[str, ...]
    ranks: tuple[int, ...]
    parameter_count: int
    backend: str


@dataclass(frozen=True, repr=False)
class Preview(Result):
    """What ``add`` would do; nothing was touched.

    Attributes:
        model_name: the notebook variable of the model.
        name: the adapter.
        method: how a person calls the method.
        rows: the targets, by last path segment.
        copies: modules that would be trained as a whole.
        excluded_count: modules that the config excludes.
        missing: target patterns that match nothing.
        parameter_count: that the new adapter trains.
        base_count: parameters of the model as it is.
        byte_count: of those parameters.
        frozen_bytes: of the frozen tensors that its layers share.
        training_bytes: gradients and AdamW's two moments for it.
        replaces: whether an adapter of that name would be reconfigured.
        memory: what training would need, or why there is no forecast.
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
    notes: tuple[str, ...] = ()
    memory: PlanResult | str = ""
    frozen_bytes: int = 0

    @property
    def module_count(self) -> int:
        """Modules that would be adapted, or trained as a whole."""
        return sum(row.module_count for row in self.rows) + len(self.copies)

    def __str__(self) -> str:
        return with_notes(f"dry run: {self.what()}; nothing was changed", self.all_notes()) + self.forecast_text()

    def what(self) -> str:
        """What would be adapted, in words."""
        where = ", ".join((*(row.target for row in self.rows), *self.copies))
        return (
            f"{self.method} {self.name!r} would {'reconfigure' if self.replaces else 'adapt'} "
            f"{plural(self.module_count, 'module')} of {self.model_name} ({where}); "
            f"{count(self.parameter_count)} parameters, {size(self.byte_count)}"
        )

    def forecast_text(self) -> str:
        """The forecast as further lines."""
        if isinstance(self.memory, PlanResult):
            return f"\nforecast: {self.memory}"
        return f"\nno forecast: {self.memory}" if self.memory else ""

    def all_notes(self) -> tuple[str, ...]:
        """Notes, and what matches nothing."""
        missing = (f"nothing matches {few(self.missing)}",) if self.missing else ()
        return (*missing, *self.notes)

    def view(self) -> Card:
        """What would be adapted, and what training would need."""
        title = f"{self.name}: dry run, nothing was changed"
        return card(title, self.blocks(), aside=f"{self.model_name}, {self.method}")

    def blocks(self) -> tuple[Block, ...]:
        """The preview without its frame."""
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
