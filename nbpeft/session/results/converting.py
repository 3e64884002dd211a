"""The result of converting an adapter to LoRA."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from nbpeft.display.blocks import Card, Details, Table, dim, line
from nbpeft.display.numbers import plural
from nbpeft.session.results.base import NotedResult, adapter_card
from nbpeft.state import AdapterState, LayerLoss, ModelState

_WHOLE = 1 - 1e-6
"""Share above which nothing counts as lost; rounding errors are smaller than the rest."""


@dataclass(frozen=True, repr=False)
class ConvertResult(NotedResult):
    """An adapter of another method was converted to LoRA.

    Attributes:
        model_name: the notebook variable of the model.
        source: the converted adapter.
        method: its method.
        adapter: the LoRA.
        layers: the preserved share of each layer, in the model's order.
        state: the model's state after the conversion.
    """

    model_name: str
    source: str
    method: str
    adapter: AdapterState
    layers: tuple[LayerLoss, ...]
    state: ModelState

    @property
    def worst(self) -> LayerLoss:
        """The layer with the smallest preserved share."""
        return min(self.layers, key=lambda layer: layer.energy_kept)

    @property
    def median(self) -> float:
        """Median of the layers' preserved shares."""
        return statistics.median(layer.energy_kept for layer in self.layers)

    @property
    def rank(self) -> str:
        """The ranks as text: ``rank 16``, or ``ranks 3 to 16``."""
        ranks = sorted({layer.rank or 0 for layer in self.layers})
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"

    @property
    def kept(self) -> str:
        """The preserved share as text."""
        if self.worst.energy_kept > _WHOLE:
            return "nothing of the change lost"
        return (
            f"keeps {_percent(self.median)} of the change in the median layer, {_percent(self.worst.energy_kept)} in "
            f"the worst ({self.worst.path})"
        )

    def _what(self) -> str:
        return (
            f"converted {self.source!r} ({self.method}) to {self.adapter.name!r} on {self.model_name}: LoRA, "
            f"{self.rank}, {plural(len(self.layers), 'layer')}, {self.kept}"
        )

    def view(self) -> Card:
        rows = tuple((item.path, str(item.rank), _percent(item.energy_kept)) for item in self.layers)
        table = Table(("Layer", "Rank", "Kept"), rows, right=(1, 2))
        lost = self.worst.energy_kept <= _WHOLE
        what = line(f"the {self.rank} LoRA closest to {self.source}", dim(f"({self.method})"))
        return adapter_card(
            "converted", self, what, line(self.kept), Details("layer by layer", table) if lost else None
        )


def _percent(share: float) -> str:
    """Returns a percentage, rounded down so that only a complete share is shown as 100 %."""
    return f"{int(share * 1000) / 10:.1f} %" if share <= _WHOLE else "100 %"
