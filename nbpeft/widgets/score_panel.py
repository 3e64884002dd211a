"""Scores, and their items page by page: the answers side by side, by what an adapter fixed, broke or has wrong."""

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
    """The scores, with controls for the metric, the filter, a search and the page of the items."""

    kind: ClassVar[str] = "score"
    session_method: ClassVar[str] = "score"
    _opened_panels: ClassVar[list[ScorePanel]] = []

    def __init__(self, result: ScoreResult, *, ui: Ui = "auto") -> None:
        super().__init__(ui)
        self._given = self._result = result
        self._filters: dict[str, tuple[Filter, ...]] = {}
        self._title, self._words, self._page = "", "", 0

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
            self._result = self._result.by(chosen)
        elif what == "filter":
            self._title = chosen
        elif what == "search":
            self._words = chosen
        self._page = int(chosen) - 1 if what == "page" else 0
        self._draw()
        return ""

    def _draw(self) -> None:
        self._parts.draw(self._result, self.filters, self.chosen, self.chosen.matching(self._words), self._page)


class _Parts:
    """The widgets of the panel."""

    def __init__(self, command: Callable[..., None]) -> None:
        import ipywidgets

        from nbpeft.widgets import controls as parts

        self._drawn, self._shown = "", 1
        self._overview, self._items, self._place = parts.html(), parts.html(), parts.html()
        self._metrics = parts.ToggleRow(command, "chips", margin="10px 0 0 0")
        self._filters = parts.ToggleRow(command, "choices", margin="10px 0 0 0")
        self._command = command
        self._search = parts.labelled("Search", ipywidgets.Text(placeholder="prompt, reference or answer"), 200)
        self._search.observe(weakly(self._typed), names="value")
        self._page = parts.labelled("page", ipywidgets.BoundedIntText(value=1, min=1, max=1), 58)
        self._page.observe(weakly(self._turned), names="value")
        self._previous = parts.button("Previous", "The items before", weakly(self._turn, -1), hides=True)
        self._next = parts.button("Next", "The items after", weakly(self._turn, 1), hides=True)
        self._foot = ipywidgets.HBox([self._previous, self._next, self._page, self._place])
        self._foot.add_class("nbpeft-foot")
        self.message = parts.Message()
        search = parts.settings_row(self._search, margin="10px 0 0 0")
        rows = (self._metrics.box, self._filters.box, search, self._items, self._foot)
        self.root = parts.panel_root(self._overview, *rows, self.message.box)

    def draw(self, result: ScoreResult, filters: tuple[Filter, ...], chosen: Filter, found: Filter, page: int) -> None:
        """Shows one page of the items that were found in the chosen filter; the first one has number 0."""
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
        count, pages = len(found.items), max(-(-len(found.items) // PAGE), 1)
        start, end = page * PAGE, min((page + 1) * PAGE, count)
        self._items.value = "".join(to_html(block) for block in found.blocks(result, start, end))
        self._place.value = span(dim(f"{start + 1}–{end} of {count}" if count else "no item matches"))
        self._shown = page + 1  # first: the field tells of its change
        with self._page.hold_trait_notifications():
            self._page.max, self._page.value = pages, page + 1
        for field in (self._previous, self._next, self._page):
            field.layout.display = None if pages > 1 else "none"
        self._previous.disabled, self._next.disabled = page == 0, page + 1 == pages

    def _typed(self) -> None:
        self._command("search", self._search.value)

    def _turn(self, pages: int) -> None:
        self._command("page", str(self._shown + pages))

    def _turned(self) -> None:
        if self._page.value != self._shown:
            self._command("page", str(self._page.value))
