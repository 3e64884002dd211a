"""Checks whether a serving engine can load an adapter, and what to change if it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.jsonable import AsDict
from nbpeft.shipping.engines import Engine, Form
from nbpeft.shipping.facts import AdapterFacts


@dataclass(frozen=True)
class Obstacle:
    """A property of an adapter that an engine does not support.

    Attributes:
        what: the property, e.g. ``DoRA on 12 layers``.
        remedy: what to change, e.g. ``train with use_dora=False``.
    """

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} ({self.remedy})"


@dataclass(frozen=True)
class Verdict(AsDict):
    """Whether an engine can load one adapter.

    Attributes:
        engine: name of the engine.
        label: its display name, with the version that the rules were taken from.
        source: URL of the rules' source.
        as_adapter: whether it can load the adapter next to its base model.
        as_merged: whether it can load the merged model.
        obstacles: why it cannot load the adapter; empty if it can.
        merged_obstacles: why it cannot load the merged model; empty if it can.
        notes: notes for the user.
    """

    engine: str
    label: str
    source: str
    as_adapter: bool
    as_merged: bool
    obstacles: tuple[Obstacle, ...]
    merged_obstacles: tuple[Obstacle, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        if self.as_adapter:
            return f"{self.label} loads the adapter directly"
        why = "; ".join(map(str, self.obstacles))
        head = f"{self.label} cannot load the adapter: {why}"
        return f"{head}; it can load the merged model (merged=…)" if self.as_merged else head


def verdict_of(engine: Engine, facts: AdapterFacts) -> Verdict:
    """Applies an engine's rules to an adapter.

    Args:
        engine: the engine.
        facts: the adapter's properties.
    """
    obstacles = obstacles_of(engine.adapter, facts, f"{engine.label} does not load adapters")
    merged = obstacles_of(engine.merged, facts, f"{engine.label} does not load merged models")
    return Verdict(
        engine.name,
        f"{engine.label} {engine.checked}".rstrip(),
        engine.source,
        not obstacles,
        not merged,
        obstacles,
        merged,
        tuple(filter(None, (note(facts) for note in engine.notes))),
    )


def obstacles_of(form: Form | None, facts: AdapterFacts, without: str) -> tuple[Obstacle, ...]:
    """Returns the reasons why an engine cannot load one form of an adapter.

    Args:
        form: the adapter itself or the merged model; None if the engine does not load that form.
        facts: the adapter's properties.
        without: text of the obstacle for a form that the engine does not load.
    """
    if form is None:
        return (Obstacle(without, "choose another engine"),)
    found = ((rule.what(facts), rule.remedy) for rule in form.rules)
    merging = f"an adapter that cannot be merged into {facts.unmergeable}" if form.merges and facts.unmergeable else ""
    never = Obstacle(merging, "serve the adapter itself") if merging else None
    return (*((never,) if never else ()), *(Obstacle(what, remedy) for what, remedy in found if what))
