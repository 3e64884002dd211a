"""Scores that a notebook shows as a panel, in which one pages through the items."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.scoring.result import ScoreResult


class PagedScores(ScoreResult):
    """The scores; where widgets work, a panel shows them. Copies are shown as a card."""

    @classmethod
    def of(cls, result: ScoreResult, notebook: NotebookContext) -> Self:
        """The same result, shown as a panel.

        Args:
            result: the scores.
            notebook: the notebook.
        """
        paged = cls(*_values(result))
        vars(paged)["notebook"] = notebook
        return paged

    def __reduce__(self) -> tuple[type[ScoreResult], tuple[Any, ...]]:
        return ScoreResult, _values(self)

    def _ipython_display_(self) -> None:
        from nbpeft.widgets import ScorePanel

        notebook = vars(self).get("notebook")
        if notebook is None:
            raise NotImplementedError  # IPython then calls _repr_html_
        ScorePanel(self, ui=notebook.ui)._ipython_display_()


def _values(result: ScoreResult) -> tuple[Any, ...]:
    return tuple(getattr(result, item.name) for item in dataclasses.fields(result))
