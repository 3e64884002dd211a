"""Scores that a notebook shows as a panel, in which one pages through the items."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

from nbpeft.scoring.result import Filter, ScoreResult

__all__ = ["Filter", "PagedScores", "ScoreResult"]


class PagedScores(ScoreResult):
    """The scores, which a function shows in a notebook. Copies are shown as a card."""

    @classmethod
    def of(cls, result: ScoreResult, show: Callable[[Self], object]) -> Self:
        """The same result.

        Args:
            result: the scores.
            show: shows it; raises NotImplementedError where it cannot.
        """
        paged = cls(*_values(result))
        vars(paged)["show"] = show
        return paged

    def to_dict(self) -> dict[str, Any]:
        """Returns the same as for the scores themselves."""
        return ScoreResult(*_values(self)).to_dict()

    def __reduce__(self) -> tuple[type[ScoreResult], tuple[Any, ...]]:
        return ScoreResult, _values(self)

    def _ipython_display_(self) -> None:
        show = vars(self).get("show")
        if show is None:
            raise NotImplementedError  # IPython then calls _repr_html_
        show(self)


def _values(result: ScoreResult) -> tuple[Any, ...]:
    return tuple(getattr(result, item.name) for item in dataclasses.fields(result))
