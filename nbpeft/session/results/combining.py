"""Results of combining and hot-swapping."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.display.blocks import Box, Card, Columns, Details, Table, card, dim, line, notes
from nbpeft.display.differences import differences
from nbpeft.display.models import activity, adapter_table, describe, model_title, with_notes
from nbpeft.display.numbers import plural
from nbpeft.session.results.base import Result, adapter_card
from nbpeft.state import AdapterState, LayerLoss, ModelState

_LOST = 1e-4
"""Relative error above which something counts as lost; rounding errors are smaller."""


@dataclass(frozen=True, repr=False)
class CombineResult(Result):
    """An adapter was created as a combination of others.

    Attributes:
        model_name: the notebook variable of the model.
        weights: (adapter, weight) pairs.
        adapter: the new adapter.
        kind: the combination type.
        rank: its rank, the largest if layers differ; None for methods without a rank.
        relative_error: norm of the error divided by the norm of the exact sum, over all layers.
        energy_kept: share of the exact sum's squared norm that is preserved, over all layers.
        layers: the errors of each layer.
        state: state of the model after the command.
        remade: whether it replaced an adapter with the same name.
        notes: messages for the user.
    """

    model_name: str
    weights: tuple[tuple[str, float], ...]
    adapter: AdapterState
    kind: str
    rank: int | None
    relative_error: float
    energy_kept: float
    layers: tuple[LayerLoss, ...]
    state: ModelState
    remade: bool = False
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> LayerLoss:
        """The layer with the largest error."""
        return max(self.layers, key=lambda layer: layer.relative_error)

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
        return self.kind if self.rank is None else f"{self.kind}, rank {self.rank}"

    @property
    def kept(self) -> str:
        """The errors as text."""
        if self.relative_error < _LOST:
            return "nothing lost"
        return f"relative error {_percent(self.relative_error)}, energy kept {_percent(self.energy_kept)}"

    def __str__(self) -> str:
        did = "remade" if self.remade else "made"
        line = (
            f"{did} {self.adapter.name!r} = {self.formula} on {self.model_name}: {self.how}, "
            f"{plural(len(self.layers), 'layer')}, {self.kept}"
        )
        if self.relative_error >= _LOST:
            line += f" (worst: {self.worst.path}, {_percent(self.worst.relative_error)})"
        return with_notes(line, self.notes)

    def view(self) -> Card:
        """Shows the new adapter, and the errors of each layer."""
        lost = self.relative_error >= _LOST
        worst = f"worst layer {self.worst.path}: {_percent(self.worst.relative_error)}" if lost else ""
        ranked = ("Rank",) if self.rank is not None else ()
        rows = tuple(
            (
                item.path,
                *(str(item.rank) for _ in ranked),
                _percent(item.relative_error),
                _percent(item.energy_kept),
            )
            for item in self.layers
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
class SwapResult(Result):
    """An adapter on the model was replaced by a saved one.

    Attributes:
        model_name: the notebook variable of the model.
        source: folder or hub id from which it was loaded.
        adapter: state of the adapter after the command.
        layers: number of layers that got new tensors.
        zeroed: layers that the new adapter does not have, on which it adds nothing.
        reset: modules trained as a whole that were reset to the base model's.
        seconds: duration in seconds, without checks by a prompt or a function.
        state: state of the model after the command.
        prompt: prompt of the check, or empty.
        before: answer to the prompt before the swap.
        after: answer to the prompt after the swap.
        notes: messages for the user.
    """

    model_name: str
    source: str
    adapter: AdapterState
    layers: int
    zeroed: tuple[str, ...]
    reset: tuple[str, ...]
    seconds: float
    state: ModelState
    prompt: str = ""
    before: str = ""
    after: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        line = (
            f"swapped {self.adapter.name!r} on {self.model_name} for {self.source}: {describe(self.adapter)}; "
            f"{self._facts()}"
        )
        if self.prompt:
            from nbpeft.display.text import columns

            line += f"\n{self.prompt}\n{columns((('before', self.before), ('after', self.after)))}"
        return with_notes(line, self.notes)

    def _facts(self) -> str:
        facts = [f"{plural(self.layers, 'layer')} in {1000 * self.seconds:.0f} ms"]
        if self.zeroed:
            facts.append(f"{plural(len(self.zeroed), 'layer')} of the old one add nothing now")
        if self.reset:
            facts.append(f"back to the base model's: {', '.join(self.reset)}")
        return ", ".join(facts)

    def view(self) -> Card:
        """Shows the adapter, and the answers before and after."""
        checked = None
        if self.prompt:
            runs, relation = differences(self.after, self.before)
            after = Box("after", runs, "same answer" if relation == "same" else relation)
            checked = (line(dim(self.prompt)), Columns((Box("before", ((self.before, False),)), after)))
        facts = line(dim(f"from {self.source}: {self._facts()}; {activity(self.state)}"))
        return adapter_card("swapped", self, facts, checked)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else f"{100 * share:.1g} %"
