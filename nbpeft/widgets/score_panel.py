"""Scores, and their items page by page: the answers side by side, filtered by what an adapter fixed or broke."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from nbpeft.display.blocks import Block, card, dim, line
from nbpeft.display.html import head, span, to_html
from nbpeft.widgets.environment import Ui
from nbpeft.widgets.lifetime import weakly
from nbpeft.widgets.panel import Panel

if TYPE_CHECKING:
    from nbpeft.session.results.paged_scores import Filter, ScoreResult

PAGE = 5
"""Number of items on a page."""
MOST = 8
"""Number of panels that keep their buttons: each needs memory for its items."""


class ScorePanel(Panel):
    """The scores, with buttons for the metric, the filter and the page of the items."""

    kind: ClassVar[str] = "score"
    session_method: ClassVar[str] = "score"
    _opened_panels: ClassVar[list[ScorePanel]] = []

    def __init__(self, result: ScoreResult, *, ui: Ui = "auto") -> None:
        super().__init__(ui)
        self._given = self._result = result
        self._filters: dict[str, tuple[Filter, ...]] = {}
        self._title, self._start = "", 0

    @property
    def _key(self) -> int:
        return id(self._given)

    @property
    def filters(self) -> tuple[Filter, ...]:
        """The filters of the chosen metric that any item passes."""
        metric = self._result.metric
        if metric not in self._filters:
            self._filters[metric] = tuple(found for found in self._result.filters() if found.items)
        return self._filters[metric]

    @property
    def chosen(self) -> Filter:
        """The filter whose items are shown; the first one where the metric has no other of its title."""
        return next((found for found in self.filters if found.title == self._title), self.filters[0])

    def _build(self) -> _Parts:
        return _Parts(self._command)

    def _opened(self) -> None:
        self._draw()
        panels = self._opened_panels
        panels[:] = [*(panel for panel in panels if panel is not self and not panel.closed), self]
        for panel in panels[:-MOST]:
            panel.close()

    def _text(self) -> str:
        return str(self._result)

    def _card(self, hint: str) -> Block:
        shown = self._result.view()
        return card(shown.title, *shown.blocks, line(dim(hint)), aside=shown.aside)

    def _run(self, what: str, chosen: str = "") -> str:
        if what == "metric":
            self._result, self._start = self._result.by(chosen), 0
        elif what == "filter":
            self._title, self._start = chosen, 0
        else:  # "previous" or "next"
            start = self._start + (PAGE if what == "next" else -PAGE)
            self._start = min(max(start, 0), (len(self.chosen.items) - 1) // PAGE * PAGE)
        self._draw()
        return ""

    def _draw(self) -> None:
        self._parts.draw(self._result, self.filters, self.chosen, self._start)


class _Parts:
    """The widgets of the panel."""

    def __init__(self, command: Callable[..., None]) -> None:
        import ipywidgets

        from nbpeft.widgets import controls as parts

        self._drawn = ""
        self._overview, self._items, self._place = parts.html(), parts.html(), parts.html()
        self._metrics = parts.ToggleRow(command, "chips", margin="10px 0 0 0")
        self._filters = parts.ToggleRow(command, "choices", margin="10px 0 0 0")
        self._previous = parts.button("Previous", "The items before", weakly(command, "previous"), hides=True)
        self._next = parts.button("Next", "The items after", weakly(command, "next"), hides=True)
        self._foot = ipywidgets.HBox([self._previous, self._next, self._place])
        self._foot.add_class("nbpeft-foot")
        self.message = parts.Message()
        rows = (self._metrics.box, self._filters.box, self._items, self._foot)
        self.root = parts.panel_root(self._overview, *rows, self.message.box)

    def draw(self, result: ScoreResult, filters: tuple[Filter, ...], chosen: Filter, start: int) -> None:
        """Shows the page of the chosen filter's items that begins with item ``start``."""
        if not self._drawn:  # the overview has all metrics and does not change
            shown = result.overview()
            inner = (to_html(block) for block in shown.blocks if block is not None)
            self._overview.value = self._drawn = head(shown.title, shown.aside, below=8) + "".join(inner)
        metrics = [facts.name for facts in result.metrics]
        if len(metrics) > 1:
            tooltips: dict[tuple[str, ...], tuple[str, str]] = {
                ("metric", name): (name, f"Filter and judge the items by {name}") for name in metrics
            }
            self._metrics.draw(tooltips, [("metric", result.metric)])
        labels: dict[tuple[str, ...], tuple[str, str]] = {
            ("filter", one.title): (str(one), f"Show these {len(one.items)} items") for one in filters
        }
        self._filters.draw(labels, [("filter", chosen.title)])
        count, end = len(chosen.items), min(start + PAGE, len(chosen.items))
        self._items.value = "".join(to_html(block) for block in chosen.blocks(result, start, end))
        self._place.value = span(dim(f"{start + 1}–{end} of {count}"))
        for button, wanted in ((self._previous, start > 0), (self._next, end < count)):
            button.layout.display = None if count > PAGE else "none"
            button.disabled = not wanted
