"""The result of inspecting an adapter: a heat map of how much it changed each layer."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass

from nbpeft.display.blocks import Block, Card, Commands, Details, HeatMap, Table, card, dim, line, notes
from nbpeft.display.numbers import NONE, plural
from nbpeft.session.results.base import NotedResult
from nbpeft.state import LayerChange

_SHOWN = 5
_BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.+)$")


@dataclass(frozen=True, repr=False)
class InspectResult(NotedResult):
    """How much an adapter changed each layer of a model.

    Attributes:
        model_name: the notebook variable of the model.
        adapter: name of the adapter.
        layers: the change of each layer, in the model's order.
        commands: what to do next, and the command for it.
        scale: the factor by which its change is multiplied.
    """

    model_name: str
    adapter: str
    layers: tuple[LayerChange, ...]
    commands: tuple[tuple[str, str], ...] = ()
    scale: float = 1.0

    @property
    def ranked(self) -> tuple[LayerChange, ...]:
        """The layers, most changed first."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.relative))

    @property
    def median(self) -> float:
        """Median of the layers' relative changes."""
        return statistics.median(layer.relative for layer in self.layers) if self.layers else 0.0

    @property
    def summary(self) -> str:
        """The amount of change as text."""
        ranked = self.ranked
        if not ranked or ranked[0].relative == 0:
            return "it changes nothing yet: train it first" if self.scale else "it changes nothing: its scale is 0"
        return (
            f"median weight change {percent(self.median)} ({plural(len(ranked), 'layer')}, "
            f"{percent(ranked[-1].relative)} to {percent(ranked[0].relative)}){self._intruders}"
        )

    @property
    def _intruders(self) -> str:
        """The number of intruder dimensions as text; empty if they were not counted."""
        counts = [layer.intruders for layer in self.layers if layer.intruders is not None]
        if not counts:
            return ""
        having = sum(count > 0 for count in counts)
        where = f" in {having} of {plural(len(counts), 'layer')}" if having else ""
        return f"; {plural(sum(counts), 'intruder dimension')} among the strongest of each layer{where}"

    @property
    def changed(self) -> bool:
        """Whether the adapter changes anything."""
        return bool(self.layers) and self.ranked[0].relative > 0

    def _what(self) -> str:
        lines = [f"{self.adapter} on {self.model_name}: {self.summary}"]
        if self.changed:
            from nbpeft.display.text import columns

            most = [(item.path, percent(item.relative), _directions(item)) for item in self.ranked[:_SHOWN]]
            lines += ["most changed:", columns(most), *(f"{what}: {command}" for what, command in self.commands)]
        return "\n".join(lines)

    def view(self) -> Card:
        return card(
            f"Where {self.adapter} changed the model",
            line(self.summary),
            self._map() if self.changed else None,
            Details("layer by layer, most changed first", self._table()) if self.changed else None,
            notes(self.notes),
            Commands(self.commands) if self.changed and self.commands else None,
            aside=self.model_name,
        )

    def _map(self) -> tuple[Block, ...]:
        """Returns a heat map with one row per kind of layer and one cell per block of the model."""
        kinds: dict[str, dict[int, LayerChange]] = {}
        for layer in self.layers:
            match = _BLOCK.match(layer.path)
            if match:
                kinds.setdefault(match.group(3), {})[int(match.group(2))] = layer
        if not kinds:
            return ()
        count = max(max(blocks) for blocks in kinds.values()) + 1
        top = self.ranked[0].relative
        rows = tuple(
            (kind, tuple(_cell(blocks[index], top) if index in blocks else None for index in range(count)))
            for kind, blocks in kinds.items()
        )
        legend = f"blocks 0 to {count - 1}, left to right; the strongest colour is {percent(top)} of the layer's weight"
        return HeatMap(rows), line(dim(legend))

    def _table(self) -> Table:
        rows: tuple[tuple[str, ...], ...] = tuple(
            (item.path, NONE if item.rank is None else str(item.rank), percent(item.relative), _directions(item))
            for item in self.ranked
        )
        titles = ("Layer", "Rank", "Change", "Directions")
        if any(item.intruders is not None for item in self.layers):
            counts = [NONE if item.intruders is None else str(item.intruders) for item in self.ranked]
            rows = tuple((*row, count) for row, count in zip(rows, counts, strict=True))
            return Table((*titles, "Intruders"), rows, right=(1, 2, 4))
        return Table(titles, rows, right=(1, 2))


def percent(share: float) -> str:
    """Returns e.g. ``1.3 %``, with two significant digits for small shares."""
    return f"{share * 100:.2g} %" if share < 1 else f"{share * 100:.0f} %"


def _directions(layer: LayerChange) -> str:
    if layer.directions is None:
        return ""
    return f"90 % of it in {layer.directions} of {layer.rank} directions"


def _cell(layer: LayerChange, top: float) -> tuple[float, str]:
    return min(layer.relative / top, 1.0), f"{layer.path}: {percent(layer.relative)}"
