"""What combining and hot-swapping give."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from nbpeft.session import render, side_by_side
from nbpeft.session.describe import acting, adapter_table, describe, with_notes
from nbpeft.session.results import Result
from nbpeft.state import AdapterState, LayerLoss, ModelState

_LOST = 1e-4
"""Relative error from which on something counts as lost: rounding stays below it."""


@dataclass(frozen=True, repr=False)
class CombineResult(Result):
    """A new adapter was made of others.

    Attributes:
        model_name: the notebook variable of the model.
        weights: (adapter, weight) pairs.
        adapter: the new adapter.
        kind: how it was made.
        rank: its rank, the largest where layers differ.
        relative_error: distance to the true weighted delta over its norm, over all layers.
        energy_kept: share of the true delta's energy that lies along the result, over all layers.
        layers: the same, layer by layer.
        state: the model as it is now.
        remade: whether it replaced an adapter of the same name.
        notes: what a person should know.
    """

    model_name: str
    weights: tuple[tuple[str, float], ...]
    adapter: AdapterState
    kind: str
    rank: int
    relative_error: float
    energy_kept: float
    layers: tuple[LayerLoss, ...]
    state: ModelState
    remade: bool = False
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> LayerLoss:
        """The layer that lost most."""
        return max(self.layers, key=lambda layer: layer.relative_error)

    @property
    def formula(self) -> str:
        """``0.7 · orders + 0.3 · pirate``."""
        first, *others = self.weights
        terms = [f"{first[1]:g} · {first[0]}"]
        terms += [f"{'-' if weight < 0 else '+'} {abs(weight):g} · {name}" for name, weight in others]
        return " ".join(terms)

    @property
    def kept(self) -> str:
        """What was kept, in words."""
        if self.relative_error < _LOST:
            return "nothing lost"
        return f"relative error {_percent(self.relative_error)}, energy kept {_percent(self.energy_kept)}"

    def __str__(self) -> str:
        did = "remade" if self.remade else "made"
        line = (
            f"{did} {self.adapter.name!r} = {self.formula} on {self.model_name}: {self.kind}, rank {self.rank}, "
            f"{render.plural(len(self.layers), 'layer')}, {self.kept}"
        )
        if self.relative_error >= _LOST:
            line += f" (worst: {self.worst.path}, {_percent(self.worst.relative_error)})"
        return with_notes(line, self.notes)

    def _html(self) -> str:
        lost = self.relative_error >= _LOST
        worst = f"; worst layer {self.worst.path}: {_percent(self.worst.relative_error)}" if lost else ""
        return render.card(
            f"{self.adapter.name} · {'combined anew' if self.remade else 'combined'}",
            render.line(escape(self.formula), render.dim(f"({self.kind}, rank {self.rank})")),
            adapter_table((self.adapter,)),
            render.line(escape(self.kept), render.dim(worst.removeprefix("; "))),
            self._layers() if lost else "",
            render.notes(self.notes),
            aside=f"{self.model_name} · {self.state.class_name}",
        )

    def _layers(self) -> str:
        rows = [
            (escape(item.path), str(item.rank), _percent(item.relative_error), _percent(item.energy_kept))
            for item in self.layers
        ]
        table = render.table(("Layer", "Rank", "Relative error", "Energy kept"), rows, right=(1, 2, 3))
        return f'<details style="margin-top:6px"><summary>layer by layer</summary>{table}</details>'


@dataclass(frozen=True, repr=False)
class SwapResult(Result):
    """A saved adapter took the place of one on the model.

    Attributes:
        model_name: the notebook variable of the model.
        source: folder or hub id it came from.
        adapter: the adapter as it is now.
        layers: how many layers took new tensors.
        zeroed: layers that the new adapter does not have; they add nothing now.
        reset: modules trained as a whole that went back to the base model's.
        seconds: how long it took, checks by a prompt or a function left out.
        state: the model as it is now.
        prompt: of the check, or empty.
        before, after: answers to the prompt.
        notes: what a person should know.
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
        checked = side_by_side.text_rows(("before", "after"), (self.before, self.after)) if self.prompt else ""
        return with_notes(f"{line}\n{self.prompt}\n{checked}" if checked else line, self.notes)

    def _facts(self) -> str:
        facts = [f"{render.plural(self.layers, 'layer')} in {1000 * self.seconds:.0f} ms"]
        if self.zeroed:
            facts.append(f"{render.plural(len(self.zeroed), 'layer')} of the old one add nothing now")
        if self.reset:
            facts.append(f"back to the base model's: {', '.join(self.reset)}")
        return ", ".join(facts)

    def _html(self) -> str:
        checked = ""
        if self.prompt:
            after, aside = side_by_side.marked(self.after, self.before)
            words = "same answer" if aside == "same" else aside
            checked = render.line(render.dim(self.prompt)) + side_by_side.columns(
                ("before", "after"), (escape(self.before), after), ("", words)
            )
        return render.card(
            f"{self.adapter.name} · swapped",
            adapter_table((self.adapter,)),
            render.line(render.dim(f"from {self.source}: {self._facts()}; {acting(self.state)}")),
            checked,
            render.notes(self.notes),
            aside=f"{self.model_name} · {self.state.class_name}",
        )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else f"{100 * share:.1g} %"
