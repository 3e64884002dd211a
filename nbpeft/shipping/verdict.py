"""Whether an engine takes an adapter as it is, and what to change where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.shipping.engines import Engine, Form
from nbpeft.shipping.facts import AdapterFacts


@dataclass(frozen=True)
class Obstacle:
    """One thing that an engine does not take.

    Attributes:
        what: what the adapter has, e.g. ``DoRA on 12 layers``.
        remedy: what to change, e.g. ``train with use_dora=False``.
    """

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} ({self.remedy})"


@dataclass(frozen=True)
class Verdict:
    """What an engine takes of one adapter.

    Attributes:
        engine: name of the engine.
        label: its name for people, with the version that its rules were read from.
        source: address of where they stand.
        as_adapter: whether it loads the adapter beside its base model.
        as_merged: whether it loads the model that the adapter is merged into.
        obstacles: why not the adapter; empty where it does.
        merged_obstacles: why not the merged model.
        notes: what a person should know before serving it.
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
            return f"{self.label} takes the adapter as it is"
        why = "; ".join(map(str, self.obstacles))
        head = f"{self.label} does not take the adapter: {why}"
        return f"{head}; it takes the merged model (merged=…)" if self.as_merged else head


def verdict_of(engine: Engine, facts: AdapterFacts) -> Verdict:
    """Applies an engine's rules to an adapter."""
    obstacles = obstacles_of(engine.adapter, facts, f"{engine.label} loads no adapters")
    merged = obstacles_of(engine.merged, facts, f"{engine.label} loads no merged models")
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
    """What keeps an adapter from one form of an engine; ``without`` where it has no such form."""
    if form is None:
        return (Obstacle(without, "choose another engine"),)
    found = ((rule.what(facts), rule.remedy) for rule in form.rules)
    merging = f"an adapter that cannot be merged into {facts.unmergeable}" if form.merges and facts.unmergeable else ""
    never = Obstacle(merging, "serve the adapter itself") if merging else None
    return (*((never,) if never else ()), *(Obstacle(what, remedy) for what, remedy in found if what))
