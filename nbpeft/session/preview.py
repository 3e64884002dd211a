"""What ``add`` would do, counted and shown before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from nbpeft.session import render
from nbpeft.session.describe import with_notes
from nbpeft.session.planned import PlanResult
from nbpeft.session.results import Result

if TYPE_CHECKING:
    from nbpeft.engine.adapter import AdapterConfig
    from nbpeft.engine.plan import Target

_ADAMW_BYTES = 2
"""Moments that AdamW keeps, each as large as the parameter."""


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
        parameter_count: of the new adapter.
        base_count: parameters of the model as it is.
        byte_count: of the new adapter.
        training_bytes: gradients and AdamW's two moments for it.
        replaces: whether an adapter of that name would be reconfigured.
        memory: what training would need, or why that cannot be told.
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

    @property
    def module_count(self) -> int:
        """Modules that would be adapted."""
        return sum(row.module_count for row in self.rows)

    def __str__(self) -> str:
        line = with_notes(f"dry run: {self.what()}; nothing was changed", self.all_notes())
        return line + self.forecast_text()

    def what(self) -> str:
        """What would be adapted, in words."""
        where = ", ".join(row.target for row in self.rows)
        return (
            f"{self.method} {self.name!r} would {'reconfigure' if self.replaces else 'adapt'} "
            f"{render.plural(self.module_count, 'module')} of {self.model_name} ({where}); "
            f"{render.count(self.parameter_count)} parameters, {render.size(self.byte_count)}"
        )

    def forecast_text(self) -> str:
        """The forecast as further lines."""
        if isinstance(self.memory, PlanResult):
            return f"\nforecast: {self.memory}"
        return f"\nno forecast: {self.memory}" if self.memory else ""

    def all_notes(self) -> tuple[str, ...]:
        """Notes, and what matches nothing."""
        missing = (f"nothing matches {render.names(self.missing)}",) if self.missing else ()
        return (*missing, *self.notes)

    def _html(self) -> str:
        return render.card(
            f"{self.name} · dry run, nothing was changed", self.body(), aside=f"{self.model_name} · {self.method}"
        )

    def body(self) -> str:
        """The preview as HTML without its card."""
        rows = [
            (
                escape(row.target),
                render.count(row.module_count),
                escape(", ".join(row.shapes)),
                ", ".join(str(rank) for rank in row.ranks) or "–",
                render.count(row.parameter_count),
                escape(row.backend),
            )
            for row in self.rows
        ]
        whole = f"whole modules: {', '.join(self.copies)}" if self.copies else ""
        excluded = f"{render.plural(self.excluded_count, 'module')} excluded" if self.excluded_count else ""
        total = (
            f"{render.count(self.parameter_count)} parameters on {render.count(self.base_count)} "
            f"({render.share(self.parameter_count, self.base_count)}); {render.size(self.byte_count)} for the adapter, "
            f"{render.size(self.training_bytes)} more for gradients and AdamW while training"
        )
        blocks = (
            render.table(("Target", "Modules", "out × in", "Rank", "Parameters", "Stored"), rows, right=(1, 3, 4)),
            render.line(render.dim(total)),
            *(render.line(render.dim(text)) for text in (whole, excluded) if text),
            render.notes(self.all_notes()),
            self._forecast(),
        )
        return "".join(blocks)

    def _forecast(self) -> str:
        if isinstance(self.memory, PlanResult):
            told = f"training, {self.memory.settings}"
            assumed = f" ({'; '.join(self.memory.notes)})" if self.memory.notes else ""
            return render.line(render.bold("memory"), render.dim(told + assumed)) + self.memory.body(settings=False)
        return render.line(render.dim(f"no forecast of memory: {self.memory}")) if self.memory else ""


def preview_of(
    base: Any,
    config: AdapterConfig,
    *,
    name: str,
    model_name: str,
    replaces: bool,
    notes: list[str],
    stored: Mapping[str, str] | None = None,
) -> Preview:
    """Plans a config on a model and counts; the model is not touched.

    Args:
        base: the base model.
        config: of the adapter to come.
        name: of the adapter to come.
        model_name: what the model is called.
        replaces: whether an adapter of that name is there.
        notes: put into the preview.
        stored: how targets will be stored by then, by path, where that is not how they are now.
    """
    from nbpeft.engine.plan import plan

    made = plan(base, config, allow_missing=True, replacing=name if replaces else None)
    byte_count = made.byte_count()
    return Preview(
        model_name=model_name,
        name=name,
        method=made.method,
        rows=_rows(made.targets, made.config, stored or {}),
        copies=tuple(made.copies),
        excluded_count=len(made.excluded),
        missing=made.missing,
        parameter_count=made.parameter_count,
        base_count=sum(parameter.numel() for parameter in base.parameters()),
        byte_count=byte_count,
        training_bytes=byte_count * (1 + _ADAMW_BYTES),
        replaces=replaces,
        notes=tuple(note for note in notes if not made.missing or "match" not in note),
    )


def _rows(targets: tuple[Target, ...], config: Any, stored: Mapping[str, str]) -> tuple[PreviewRow, ...]:
    """Targets by last path segment, in model order."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.path.rpartition(".")[2], []).append(target)
    return tuple(
        PreviewRow(
            target=segment,
            module_count=len(group),
            shapes=tuple(dict.fromkeys(f"{item.out_features} × {item.in_features}" for item in group)),
            ranks=tuple(sorted({size for item in group if (size := item.adapter_class.size_of(item.shapes))})),
            parameter_count=sum(item.parameter_count for item in group),
            backend=", ".join(dict.fromkeys(stored.get(item.path, item.backend) for item in group)),
        )
        for segment, group in groups.items()
    )
