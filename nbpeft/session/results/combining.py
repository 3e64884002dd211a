"""Results of combining and hot-swapping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbpeft.display.blocks import Box, Card, Columns, Details, Table, card, dim, line, notes
from nbpeft.display.differences import differences
from nbpeft.display.models import activity, adapter_table, describe, model_title
from nbpeft.display.numbers import plural
from nbpeft.session.results.base import RecordResult, adapter_card
from nbpeft.state import AdapterState, ModelState

if TYPE_CHECKING:
    from nbpeft.engine.hotswap import Swapped
    from nbpeft.model.combine.combining import Combined

_LOST = 1e-4
"""Relative error above which something counts as lost; rounding errors are smaller."""


@dataclass(frozen=True, repr=False)
class CombineResult(RecordResult):
    """An adapter was created as a combination of others. Has the attributes of ``combined``.

    Attributes:
        model_name: the notebook variable of the model.
        weights: (adapter, weight) pairs.
        adapter: the new adapter.
        combined: its rank and its errors, in total and for each layer.
        state: state of the model after the command.
        remade: whether it replaced an adapter with the same name.
    """

    _RECORD = "combined"
    model_name: str
    weights: tuple[tuple[str, float], ...]
    adapter: AdapterState
    combined: Combined
    state: ModelState
    remade: bool = False

    @property
    def kind(self) -> str:
        """The combination type."""
        return self.combined.combination_type

    @property
    def formula(self) -> str:
        """The weighted sum as text: ``0.7 × orders + 0.3 × pirate``."""
        first, *others = self.weights
        terms = [f"{first[1]:g} × {first[0]}"]
        terms += [f"{'-' if weight < 0 else '+'} {abs(weight):g} × {name}" for name, weight in others]
        return " ".join(terms)

    @property
    def how(self) -> str:
        """The type, and the rank if there is one."""
        rank = self.combined.rank
        return self.kind if rank is None else f"{self.kind}, rank {rank}"

    @property
    def kept(self) -> str:
        """The errors as text."""
        made = self.combined
        if made.relative_error < _LOST:
            return "nothing lost"
        return f"relative error {_percent(made.relative_error)}, energy kept {_percent(made.energy_kept)}"

    def _what(self) -> str:
        did, made = "remade" if self.remade else "made", self.combined
        line = (
            f"{did} {self.adapter.name!r} = {self.formula} on {self.model_name}: {self.how}, "
            f"{plural(len(made.layers), 'layer')}, {self.kept}"
        )
        if made.relative_error >= _LOST:
            line += f" (worst: {made.worst.path}, {_percent(made.worst.relative_error)})"
        return line

    def view(self) -> Card:
        made = self.combined
        lost = made.relative_error >= _LOST
        worst = f"worst layer {made.worst.path}: {_percent(made.worst.relative_error)}" if lost else ""
        ranked = ("Rank",) if made.rank is not None else ()
        rows = tuple(
            (item.path, *(str(item.rank) for _ in ranked), _percent(item.relative_error), _percent(item.energy_kept))
            for item in made.layers
        )
        head = ("Layer", *ranked, "Relative error", "Energy kept")
        table = Table(head, rows, right=tuple(range(1, len(head))))
        return card(
            f"{self.adapter.name}: {'combined again' if self.remade else 'combined'}",
            line(self.formula, dim(f"({self.how})")),
            adapter_table((self.adapter,)),
            line(self.kept, dim(worst)),
            Details("layer by layer", table) if lost else None,
            notes(self.notes),
            aside=model_title(self.state),
        )


@dataclass(frozen=True, repr=False)
class SwapResult(RecordResult):
    """An adapter on the model was replaced by a saved one. Has the attributes of ``swapped``.

    Attributes:
        model_name: the notebook variable of the model.
        source: folder or hub id from which it was loaded.
        adapter: state of the adapter after the command.
        swapped: the layers with new tensors, and those that were reset.
        seconds: duration in seconds, without checks by a prompt or a function.
        state: state of the model after the command.
        prompt: prompt of the check, or empty.
        before: answer to the prompt before the swap.
        after: answer to the prompt after the swap.
    """

    _RECORD = "swapped"
    model_name: str
    source: str
    adapter: AdapterState
    swapped: Swapped
    seconds: float
    state: ModelState
    prompt: str = ""
    before: str = ""
    after: str = ""

    def _what(self) -> str:
        line = (
            f"swapped {self.adapter.name!r} on {self.model_name} for {self.source}: {describe(self.adapter)}; "
            f"{self._facts()}"
        )
        if self.prompt:
            from nbpeft.display.text import columns

            line += f"\n{self.prompt}\n{columns((('before', self.before), ('after', self.after)))}"
        return line

    def _facts(self) -> str:
        done = self.swapped
        facts = [f"{plural(done.layers, 'layer')} in {1000 * self.seconds:.0f} ms"]
        if done.zeroed:
            facts.append(f"{plural(len(done.zeroed), 'layer')} of the old one add nothing now")
        if done.reset:
            facts.append(f"back to the base model's: {', '.join(done.reset)}")
        return ", ".join(facts)

    def view(self) -> Card:
        checked = None
        if self.prompt:
            runs, relation = differences(self.after, self.before)
            after = Box("after", runs, "same answer" if relation == "same" else relation)
            checked = (line(dim(self.prompt)), Columns((Box("before", ((self.before, False),)), after)))
        facts = line(dim(f"from {self.source}: {self._facts()}; {activity(self.state)}"))
        return adapter_card("swapped", self, facts, checked)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else f"{100 * share:.1g} %"
