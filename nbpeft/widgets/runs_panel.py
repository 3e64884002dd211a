"""The saved runs: a click on a column sorts them, a search filters them, and those selected are compared below.

Below the table, the selected runs can be deleted, and one alone renamed and given a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import Block, Stack, Text, dim, line
from nbpeft.display.html import grid_row, head, span, to_html
from nbpeft.display.numbers import plural
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, few
from nbpeft.session.results.kept_runs import SORTS, Column, RunsComparison, RunsResult, why_unreadable
from nbpeft.widgets.environment import Ui
from nbpeft.widgets.lifetime import weakly
from nbpeft.widgets.panel import Panel

if TYPE_CHECKING:
    from nbpeft.session import Session

MOST = 12
"""Number of runs that are shown at first."""
_Key = tuple[str, str]
"""Name and id of a run, see ``RunRecord.key``."""
_HINT = "Select one run to rename it or to note something, two or more to compare them."


class RunsPanel(Panel):
    """The table of runs with a check box in each row.

    Args:
        session: Reads and changes the runs.
        result: All runs of its folder.
        sort: The column by which they are sorted.
        search: The words that are searched at first.
        ui: How to show it; by default the richest form that works here.

    Attributes:
        result: The runs that match the search, in the order shown.
    """

    kind: ClassVar[str] = "runs"
    session_method: ClassVar[str] = "runs"

    def __init__(
        self, session: Session, result: RunsResult, sort: str = "time", *, search: str = "", ui: Ui = "auto"
    ) -> None:
        super().__init__(ui)
        self._session, self._all, self._sort = session, result, sort
        self.result = result.matching(search)
        self._selected: list[_Key] = []
        self._limit = MOST
        self._comparison: RunsComparison | None = None

    @property
    def selected(self) -> tuple[str, ...]:
        """Names of the selected runs."""
        return tuple(name for name, _ in self._selected)

    @property
    def _key(self) -> tuple[int, str]:
        return (id(self._session), self.result.place)

    def _build(self) -> _Parts:
        return _Parts(self._command, self.result.search)

    def _opened(self) -> None:
        self._draw()

    def _text(self) -> str:
        return str(self.result) if self._comparison is None else f"{self.result}\n{self._comparison}"

    def _card(self, hint: str) -> Block:
        listed = self.result.view()
        listed = replace(listed, blocks=(*listed.blocks, line(dim(hint))))
        return listed if self._comparison is None else Stack((listed, self._comparison.view()))

    def _run(self, what: str, *arguments: Any) -> str:
        told = ""
        if what == "sort":
            self._sort = arguments[0]
            self._show(self._all.sorted(self._sort))
        elif what == "search":
            self._show(self._all, arguments[0])
        elif what == "more":
            self._limit = len(self.result.records)
        elif what == "select":
            key, wanted = arguments
            try:
                self._select([*(other for other in self._selected if other != key), *([key] if wanted else [])])
            except CheckpointError:  # a selected one is gone
                self._list()
                raise
        else:  # "delete", "rename" or "note"
            told = self._change(what, *arguments)
        self._draw()
        self._changed()
        return told

    def _change(self, what: str, *arguments: str) -> str:
        """Changes those of the selected runs that can be changed, and lists all again.

        Raises:
            CheckpointError: some could not be changed; the message says for each run what happened.
        """
        session, told, left, failed = self._session, list[str](), list[_Key](), False
        changes: dict[str, Callable[..., object]] = {
            "delete": session.delete_run,
            "rename": session.rename_run,
            "note": session.note_run,
        }
        for name, run_id in self._selected:
            try:
                told.append(str(changes[what](name, *arguments, run_id=run_id)))
                left.append((arguments[0] if what == "rename" else name, run_id))
            except CheckpointError as error:
                gone = isinstance(error, CheckpointNotFoundError)
                told.append(f"run {name} is gone" if gone else str(error))
                left.append((name, run_id))
                failed = True
        self._selected = left
        self._list()
        if failed:
            raise CheckpointError(" · ".join(told))
        return " · ".join(told)

    def _list(self) -> None:
        """Lists all runs again; those that are gone, or of which another one has the name now, are not selected."""
        listed = self._session.runs()
        assert isinstance(listed, RunsResult)
        if self._sort not in {column.sort for column in listed.columns()}:  # the setting differs no longer
            self._sort = SORTS[0]
        self._show(listed.sorted(self._sort))
        there = {record.key for record in listed.records}
        self._select([key for key in self._selected if key in there])

    def _show(self, listed: RunsResult, search: str | None = None) -> None:
        self._all = listed
        self.result = listed.matching(self.result.search if search is None else search)

    def _select(self, keys: list[_Key]) -> None:
        """Selects runs, and compares them if there are several.

        Raises:
            CheckpointError: one of them is gone, or another run has its name now; or none can be read.
        """
        self._selected, self._comparison = keys, None
        if len(keys) > 1:
            compared = self._session.runs(*(name for name, _ in keys))
            assert isinstance(compared, RunsComparison)
            for (name, _), record in zip(keys, compared.records, strict=True):
                if record.key not in keys:
                    raise CheckpointError(f"the list was out of date: {name} is another run now; select it again")
            self._comparison = compared

    def _failed(self) -> None:
        self._draw()
        self._changed()

    def _draw(self) -> None:
        self._parts.draw(self._all, self.result, self._sort, self._limit, self.selected)
        self._parts.compare(self._comparison)


class _Parts:
    """The widgets of the panel."""

    def __init__(self, command: Callable[..., None], search: str) -> None:
        import ipywidgets

        from nbpeft.widgets import controls as parts

        self._command = command
        self._head = parts.html()
        self._search = parts.labelled("Search", ipywidgets.Text(value=search, placeholder="name, note or setting"), 200)
        self._search.observe(weakly(self._typed), names="value")
        self._searching = parts.settings_row(self._search, margin="0 0 6px 0")
        self._titles: dict[tuple[str, str], Any] = {}
        self._rows: dict[_Key, _Row] = {}
        self._grid = ipywidgets.Box([], layout=ipywidgets.Layout())
        self._grid.add_class("nbpeft-runs-grid")
        self._table = ipywidgets.VBox([self._grid])
        self._table.add_class("nbpeft-runs")
        self._more = parts.button("Show all", "Show all runs", weakly(command, "more"), hides=True)
        self._hint = parts.html()
        self._changes = _Changes(command)
        self._compared = parts.html()
        self.message = parts.Message()
        foot = ipywidgets.HBox([self._hint, self._more])
        foot.add_class("nbpeft-foot")
        below = (foot, self._changes.box, self.message.box, self._compared)
        self.root = parts.panel_root(self._head, self._searching, self._table, *below)
        self.root.add_class("nbpeft-wide")

    def draw(self, listed: RunsResult, found: RunsResult, sort: str, limit: int, selected: tuple[str, ...]) -> None:
        """Shows the first ``limit`` of the runs that were found, and what can be done with the selected ones."""
        from nbpeft.widgets.controls import one_each

        columns, total, count = listed.columns(), len(listed.records), len(found.records)
        title = f"{count:,} of {plural(total, 'run')}" if found.search else plural(total, "run")
        self._head.value = head(title, dim(listed.about), below=8)
        self._searching.layout.display = None if total > 1 or found.search else "none"
        widths = self._draw_titles(columns, sort)
        shown = {record.key: record for record in found.records[:limit]}
        self._rows = one_each(self._table, self._rows, shown, lambda key: _Row(key, self._command))
        for key, record in shown.items():
            cells = grid_row(((column.cell(record), "") for column in columns), widths)
            self._rows[key].draw(cells, on=record.name in selected)
        self._more.layout.display = None if count > limit else "none"
        hints = [*why_unreadable(found.records), *([_HINT] if count and len(selected) < 2 else [])]
        self._hint.value = "".join(to_html(line(dim(words))) for words in hints)
        self._changes.draw({record.name: record.note for record in listed.records if record.name in selected})

    def _draw_titles(self, columns: tuple[Column, ...], sort: str) -> str:
        """Shows the titles of the columns, which a click sorts by; returns their CSS widths."""
        from nbpeft.widgets.controls import mark, one_each

        self._titles = one_each(
            self._grid, self._titles, [(column.title, column.sort) for column in columns], lambda key: self._title(*key)
        )
        for (_, order), title in self._titles.items():
            mark(title, "nbpeft-on", order == sort)
        widths = " ".join(column.width for column in columns)
        self._grid.layout.grid_template_columns = widths
        return widths

    def _title(self, title: str, sort: str) -> Any:
        from nbpeft.widgets import controls as parts

        if not sort:
            return parts.html(span(dim(title)))
        label = title.replace("_", "_\u200b")  # a place where a narrow column breaks it
        return parts.button(label, f"Sort by {title.lower()}", weakly(self._command, "sort", sort), "bare")

    def compare(self, comparison: RunsComparison | None) -> None:
        """Shows the comparison of the selected runs, or none."""
        self._compared.value = "" if comparison is None else f'<div style="margin-top:10px">{_inner(comparison)}</div>'

    def _typed(self) -> None:
        self._command("search", self._search.value)


class _Changes:
    """What changes the selected runs: the name and the note of one alone, and a deletion."""

    def __init__(self, command: Callable[..., None]) -> None:
        import ipywidgets

        from nbpeft.widgets import controls as parts

        self._command = command
        self._notes: dict[str, str] = {}
        self._name = parts.labelled("Name", ipywidgets.Text(), 220)
        self._note = parts.labelled("Note", ipywidgets.Text(placeholder="what this run was for"), 300)
        parts.on_enter(self._name, weakly(self._renamed))
        parts.on_enter(self._note, weakly(self._noted))
        rename = parts.button("Rename", "Give the run this name", weakly(self._renamed), hides=True)
        save = parts.button("Save note", "Keep this note with the run", weakly(self._noted), hides=True)
        self._fields = [self._name, rename, self._note, save]
        self._ask = parts.button(
            "Delete", "Delete the selected runs, after a confirmation", weakly(self._asked), hides=True
        )
        self._question = parts.html(flex="0 1 auto")
        delete = parts.button("Delete", "Delete these runs with their checkpoints", weakly(self._deleted), "danger")
        keep = parts.button("Keep", "Delete nothing", weakly(self._close), "apart")
        self._sure = ipywidgets.HBox([self._question, delete, keep])
        self._sure.add_class("nbpeft-form")
        self.box = ipywidgets.VBox([parts.settings_row(*self._fields, self._ask), self._sure])
        self.box.layout.display = "none"

    def draw(self, notes: dict[str, str]) -> None:
        """Shows the changes possible to the selected runs, each with its note; typed text stays until these change."""
        if notes == self._notes:
            return
        self._notes = notes
        self._close()
        self.box.layout.display = None if notes else "none"
        for field in self._fields:
            field.layout.display = None if len(notes) == 1 else "none"
        if len(notes) == 1:
            ((self._name.value, self._note.value),) = notes.items()

    def _asked(self) -> None:
        names = few(list(self._notes), quoted=False)
        words = f"Delete {names} with all checkpoints? The adapters on the model stay."
        self._question.value = span(Text(words, wrap="words"))
        self._ask.layout.display, self._sure.layout.display = "none", None

    def _close(self) -> None:
        self._ask.layout.display, self._sure.layout.display = None, "none"

    def _renamed(self) -> None:
        self._command("rename", self._name.value.strip())

    def _noted(self) -> None:
        self._command("note", self._note.value)

    def _deleted(self) -> None:
        self._close()
        self._command("delete")


class _Row:
    """One run with its check box."""

    def __init__(self, key: _Key, command: Callable[..., None]) -> None:
        import ipywidgets

        from nbpeft.widgets import controls as parts

        self._key, self._command, self._on = key, command, False
        self._box = ipywidgets.Checkbox(
            description=f"Select {key[0]}", indent=False, layout=ipywidgets.Layout(width="22px", margin="0")
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
        self._on = self._box.value = on
        mark(self.box, "nbpeft-on", on)

    def _toggled(self) -> None:
        if self._box.value != self._on:
            self._command("select", self._key, bool(self._box.value))


def _inner(comparison: RunsComparison) -> str:
    view = comparison.view()
    return head(view.title) + "".join(to_html(block) for block in view.blocks if block is not None)
