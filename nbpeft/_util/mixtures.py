"""Mixtures of data: rows of several sources, each with a share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbpeft._util.numeric import is_finite_number
from nbpeft.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """A part of a mixture.

    Attributes:
        name: its name in messages.
        data: rows, or where they are.
        weight: its share, relative to those of the other parts.
    """

    name: str
    data: Any
    weight: float


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources, in the form of the argument ``data`` of a training.

    Attributes:
        parts: the sources.
    """

    parts: tuple[Part, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each part; their sum is 1."""
        total = sum(part.weight for part in self.parts)
        return tuple(part.weight / total for part in self.parts)


def mixture(*parts: tuple[Any, float], **named: tuple[Any, float]) -> Mixture:
    """Mixes rows of several sources: ``mixture((chats, 0.7), ("more.jsonl", 0.3))``.

    Rows are drawn by the training's ``seed``, each at most once: as many as possible, so that the smallest part,
    relative to its share, is used whole. Scores always draw the same rows.

    Args:
        *parts: (rows or where they are, share); shares are relative to each other.
        **named: the same with names for messages.

    Raises:
        ConfigError: there are fewer than two parts, or a share is not a number greater than 0.
    """
    unnamed = [
        (data if isinstance(data, str) else f"part {place}", data, weight)
        for place, (data, weight) in enumerate(map(_pair, parts))
    ]
    given = [*unnamed, *((name, *_pair(part)) for name, part in named.items())]
    if len(given) < 2:
        raise ConfigError("a mixture has at least two parts: mixture((rows, 0.7), ('more.jsonl', 0.3))", field="data")
    for name, data, weight in given:
        if isinstance(data, Mapping | Mixture):
            raise ConfigError(f"{name} of a mixture is a {type(data).__name__}, not rows", field="data")
        if not is_finite_number(weight) or weight <= 0:
            raise ConfigError(f"the share of {name} must be a number greater than 0, not {weight!r:.40}", field="data")
    return Mixture(tuple(Part(name, data, float(weight)) for name, data, weight in given))


def _pair(part: Any) -> tuple[Any, Any]:
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise ConfigError("a part of a mixture is (rows or where they are, share)", field="data")
    return part[0], part[1]
