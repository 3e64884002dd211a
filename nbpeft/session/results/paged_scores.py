"""Scores that a notebook shows as a panel, in which one pages through the items."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nbpeft.scoring.result import Filter, ScoreResult

__all__ = ["Filter", "PagedScores", "ScoreResult"]


@dataclass(frozen=True, repr=False)
class PagedScores(ScoreResult):
    """The scores, which a function shows in a notebook. Copies are shown as a card.

    Attributes:
        show: shows them; raises NotImplementedError where it cannot.
    """

    show: Callable[[PagedScores], object] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, result: ScoreResult, show: Callable[[PagedScores], object]) -> PagedScores:
        """The same result."""
        return dataclasses.replace(cls(*_values(result)), show=show)

    def to_dict(self) -> dict[str, Any]:
        """Returns the same as for the scores themselves."""
        return ScoreResult(*_values(self)).to_dict()

    def __reduce__(self) -> tuple[type[ScoreResult], tuple[Any, ...]]:
        return ScoreResult, _values(self)

    def _ipython_display_(self) -> None:
        if self.show is None:
            raise NotImplementedError  # IPython then calls _repr_html_
        self.show(self)


def _values(result: ScoreResult) -> tuple[Any, ...]:
    return tuple(getattr(result, item.name) for item in dataclasses.fields(ScoreResult))
