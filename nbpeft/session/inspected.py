"""What inspecting an adapter gives: a map of the model, darker where the adapter changed more."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from html import escape

from nbpeft.session import render
from nbpeft.session.describe import with_notes
from nbpeft.session.results import Result
from nbpeft.state import LayerChange

_SHOWN = 5
_BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_CELL = 16
"""Pixels."""


@dataclass(frozen=True, repr=False)
class InspectResult(Result):
    """Where an adapter changed a model.

    Attributes:
        model_name: the notebook variable of the model.
        adapter: which adapter.
        layers: layer by layer, in the model's order.
        notes: what a person should know.
    """

    model_name: str
    adapter: str
    layers: tuple[LayerChange, ...]
    notes: tuple[str, ...] = ()

    @property
    def ranked(self) -> tuple[LayerChange, ...]:
        """The layers, most changed first."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.relative))

    @property
    def median(self) -> float:
        """The relative change in the middle of all layers."""
        return statistics.median(layer.relative for layer in self.layers) if self.layers else 0.0

    @property
    def summary(self) -> str:
        """How much changed, in words."""
        ranked = self.ranked
        if not ranked or ranked[0].relative == 0:
            return "it changes nothing yet: train it first"
        return (
            f"moves {render.plural(len(ranked), 'layer')} by {percent(self.median)} of their weight in the median "
            f"({percent(ranked[-1].relative)} to {percent(ranked[0].relative)})"
        )

    def __str__(self) -> str:
        lines = [f"{self.adapter} on {self.model_name}: {self.summary}"]
        if self.ranked and self.ranked[0].relative > 0:
            most = [(item.path, percent(item.relative), _directions(item)) for item in self.ranked[:_SHOWN]]
            lines += ["most changed:", render.columns(most)]
        return with_notes("\n".join(lines), self.notes)

    def _html(self) -> str:
        changed = bool(self.ranked) and self.ranked[0].relative > 0
        return render.card(
            f"{self.adapter} · where it changed the model",
            render.line(escape(self.summary)),
            self._map() if changed else "",
            self._table() if changed else "",
            render.notes(self.notes),
            aside=self.model_name,
        )

    def _map(self) -> str:
        """One line a kind of layer, one cell a block of the model."""
        kinds: dict[str, dict[int, LayerChange]] = {}
        for layer in self.layers:
            match = _BLOCK.match(layer.path)
            if match:
                kinds.setdefault(match.group(3), {})[int(match.group(2))] = layer
        if not kinds:
            return ""
        count = max(max(blocks) for blocks in kinds.values()) + 1
        top = self.ranked[0].relative
        lines = []
        for kind, blocks in kinds.items():
            cells = "".join(_cell(blocks.get(block), top) for block in range(count))
            label = "font-size:12px;text-align:right;white-space:nowrap;padding-right:8px"
            lines.append(f'<div style="{label}">{escape(kind)}</div><div style="display:flex;gap:1px">{cells}</div>')
        legend = f"blocks 0 to {count - 1}, left to right; the strongest colour is {percent(top)} of the layer's weight"
        grid = "display:grid;grid-template-columns:max-content auto;row-gap:2px;align-items:center"
        return f'<div style="{grid};margin-top:10px;overflow-x:auto">{"".join(lines)}</div>{render.note(legend)}'

    def _table(self) -> str:
        rows = [
            (escape(item.path), "–" if item.rank is None else str(item.rank), percent(item.relative), _directions(item))
            for item in self.ranked
        ]
        table = render.table(("Layer", "Rank", "Change", "Directions"), rows, right=(1, 2))
        return f'<details style="margin-top:6px"><summary>layer by layer, most changed first</summary>{table}</details>'


def percent(share: float) -> str:
    """``1.3 %``; as many digits as tell small changes apart."""
    return f"{share * 100:.2g} %" if share < 1 else f"{share * 100:.0f} %"


def _directions(layer: LayerChange) -> str:
    if layer.directions is None:
        return ""
    return f"90 % of it in {layer.directions} of {layer.rank} directions"


def _cell(layer: LayerChange | None, top: float) -> str:
    size = f"width:{_CELL}px;height:{_CELL}px;border-radius:2px"
    if layer is None:
        return f'<div style="{size}"></div>'
    told = escape(f"{layer.path}: {percent(layer.relative)}", quote=True)
    opacity = 0.06 + 0.94 * min(layer.relative / top, 1.0)
    return f'<div title="{told}" style="{size};background:var(--jp-brand-color1, #1976d2);opacity:{opacity:.2f}"></div>'
