"""The saved runs: a click on a column sorts them, and those selected are compared below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import Block, Stack, dim, line
from nbpeft.display.html import grid_row, head, span, to_html
from nbpeft.display.numbers import plural
from nbpeft.session.results.kept_runs import Column, RunsComparison, RunsResult, sorted_records, why_unreadable
from nbpeft.widgets.environment import Ui
from nbpeft.widgets.lifetime import weakly
from nbpeft.widgets.panel import Panel

if TYPE_CHECKING:
    from nbpeft.session import Session

MOST = 12
"""Number of runs that are shown at first."""
_HINT = "Select two or more runs to compare them."


class RunsPanel(Panel):
    """The table of runs with a check box in each row.

    Attributes:
        result: The runs in the order shown.
    """

    kind: ClassVar[str] = "runs"
    session_method: ClassVar[str] = "runs"

    def __init__(self, session: Session, result: RunsResult, sort: str = "time", *, ui: Ui = "auto") -> None:
        super().__init__(ui)
        self._session, self.result, self._sort = session, result, sort
        self._selected: list[str] = []
        self._limit = MOST
        self._comparison: RunsComparison | None = None

    @property
    def selected(self) -> tuple[str, ...]:
        """Names of the selected runs."""
        return tuple(self._selected)

    @property
    def _key(self) -> tuple[int, str]:
        return (id(self._session), self.result.place)

    def _build(self) -> _Parts:
        return _Parts(self._command, self.result.columns())

    def _opened(self) -> None:
        self._draw()

    def _text(self) -> str:
        return str(self.result) if self._comparison is None else f"{self.result}\n{self._comparison}"

    def _card(self, hint: str) -> Block:
        listed = self.result.view()
        listed = replace(listed, blocks=(*listed.blocks, line(dim(hint))))
        return listed if self._comparison is None else Stack((listed, self._comparison.view()))

    def _run(self, what: str, *arguments: Any) -> str:
        if what == "sort":
            self._sort = arguments[0]
            order = {record.name: place for place, record in enumerate(self.result.records)}
            records = sorted_records(self.result.records, self._sort)
            curves = self.result.curves
            sorted_curves = tuple(curves[order[record.name]] for record in records) if curves else ()
            self.result = RunsResult(self.result.place, records, sorted_curves)
        elif what == "more":
            self._limit = len(self.result.records)
        else:  # "select"
            name, wanted = arguments
            self._selected = [*(other for other in self._selected if other != name), *([name] if wanted else [])]
            several = len(self._selected) > 1
            compared = self._session.runs(*self._selected) if several else None
            self._comparison = compared if isinstance(compared, RunsComparison) else None
        self._draw()
        self._changed()
        return ""

    def _draw(self) -> None:
        self._parts.draw(self.result, self._sort, self._limit, self._selected, self._comparison)


class _Parts:
    """The widgets of the panel."""

    def __init__(self, command: Callable[..., None], columns: tuple[Column, ...]) -> None:
        import ipywidgets

        from nbpeft.widgets import controls as parts

        self._command, self._widths = command, " ".join(column.width for column in columns)
        self._head = parts.html()
        self._titles = {
            column.sort: parts.button(
                column.title.replace("_", "_\u200b"),  # a place where a narrow column breaks it
                f"Sort by {column.title.lower()}",
                weakly(command, "sort", column.sort),
                "bare",
            )
            for column in columns
            if column.sort
        }
        self._rows: dict[str, _Row] = {}
        cells = [self._titles.get(column.sort) or parts.html(span(dim(column.title))) for column in columns]
        titles = ipywidgets.Box(cells, layout=ipywidgets.Layout(grid_template_columns=self._widths))
        titles.add_class("nbpeft-runs-grid")
        self._table = ipywidgets.VBox([titles])
        self._table.add_class("nbpeft-runs")
        self._more = parts.button("Show all", "Show all runs", weakly(command, "more"), hides=True)
        self._hint = parts.html()
        self._compared = parts.html()
        self.message = parts.Message()
        foot = ipywidgets.HBox([self._hint, self._more])
        foot.add_class("nbpeft-foot")
        self.root = parts.panel_root(self._head, self._table, foot, self._compared, self.message.box)
        self.root.add_class("nbpeft-wide")

    def draw(
        self, result: RunsResult, sort: str, limit: int, selected: list[str], comparison: RunsComparison | None
    ) -> None:
        """Shows the first ``limit`` runs, and the comparison of the selected ones."""
        from nbpeft.widgets.controls import mark, one_each

        count = len(result.records)
        self._head.value = head(plural(count, "run"), dim(result.about), below=8)
        for name, title in self._titles.items():
            mark(title, "nbpeft-on", name == sort)
        cells = dict(zip((record.name for record in result.records), result.rows(), strict=True))
        names = [record.name for record in result.records[:limit]]
        self._rows = one_each(self._table, self._rows, names, lambda name: _Row(name, self._command))
        for name in names:
            self._rows[name].draw(grid_row(((cell, "") for cell in cells[name]), self._widths), on=name in selected)
        self._more.layout.display = None if count > limit else "none"
        hints = [*why_unreadable(result.records), *([_HINT] if count > 1 and comparison is None else [])]
        self._hint.value = "".join(to_html(line(dim(words))) for words in hints)
        self._compared.value = "" if comparison is None else f'<div style="margin-top:10px">{_inner(comparison)}</div>'


class _Row:
    """One run with its check box."""

    def __init__(self, name: str, command: Callable[..., None]) -> None:
        import ipywidgets

        from nbpeft.widgets import controls as parts

        self._name, self._command = name, command
        self._box = ipywidgets.Checkbox(
            description=f"Compare {name}", indent=False, layout=ipywidgets.Layout(width="22px", margin="0")
        )
        self._box.add_class("nbpeft-unlabelled")
        self._box.observe(weakly(self._toggled), names="value")
        self._cells = parts.html(flex="1 1 auto", min_width="0")
        self.box = ipywidgets.HBox([self._box, self._cells])
        self.box.add_class("nbpeft-row")

    def draw(self, cells: str, *, on: bool) -> None:
        """Shows the run as it is now, with its cells as HTML."""
        from nbpeft.widgets.controls import mark

        self._cells.value = cells
        mark(self.box, "nbpeft-on", on)

    def _toggled(self) -> None:
        self._command("select", self._name, bool(self._box.value))


def _inner(comparison: RunsComparison) -> str:
    view = comparison.view()
    return head(view.title) + "".join(to_html(block) for block in view.blocks if block is not None)
