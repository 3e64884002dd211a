"""The table of adapters, and the buttons below it that open the compare or the blend panel.

The table has one row for each adapter, with buttons to save and delete it, and a filter if there are many.
Only visible rows are made of widgets: two hundred adapters would need two thousand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets

from nbpeft.display.blocks import Cell, Text, dim
from nbpeft.display.html import grid_row, span
from nbpeft.display.models import ADAPTER_HEAD, adapter_cells, condition
from nbpeft.display.numbers import plural
from nbpeft.state import AdapterState, ModelState
from nbpeft.widgets.blend_panel import BlendPanel
from nbpeft.widgets.compare_panel import ComparePanel
from nbpeft.widgets.controls import Command, button, html, labelled, mark, on_enter, one_each
from nbpeft.widgets.lifetime import close_tree, shared, weakly

if TYPE_CHECKING:
    from nbpeft.session import Session
    from nbpeft.widgets.answer_panel import AnswerPanel

MOST = 12
"""Rows that are visible at first; with more adapters there is a filter."""
_KINDS: dict[str, tuple[type[AnswerPanel], str]] = {
    "Compare answers": (ComparePanel, "Compare the answers of the base model and the adapters to one prompt"),
    "Blend adapters": (BlendPanel, "Weight adapters with sliders and see the answer of their sum"),
}
_COLUMNS = ("", "nbpeft-extra", "nbpeft-number", "")
"""CSS classes of the columns; the style sheet lays them out."""


def row_head() -> str:
    """The column titles of the table."""
    return grid_row((dim(title), kind) for title, kind in zip(ADAPTER_HEAD, _COLUMNS, strict=True))


def adapter_row(adapter: AdapterState) -> str:
    """One adapter in the table."""
    first, *cells, _ = adapter_cells(adapter)
    below = first[1:] if isinstance(first, tuple) else ()
    name = Text(adapter.name, "bold" if adapter.active else "", adapter.name, "cut")
    shown: list[Cell] = [(name, *below), *cells, condition(adapter, brief=True)]
    return grid_row(zip(shown, _COLUMNS, strict=True))


class Row:
    """One adapter with its buttons, and below it the form in which a click is confirmed."""

    def __init__(self, name: str, command: Command) -> None:
        self._name = name
        self._command = command
        self._adapter: AdapterState | None = None
        self._cells = html(flex="1 1 260px", min_width="0")
        self._save = button("Save", f"Save {name} to a folder", weakly(self._toggle, "save"))
        self._delete = button(
            "Delete", f"Delete {name}, after a confirmation", weakly(self._toggle, "delete"), "bare", "apart"
        )
        self._asked = ""
        self._form: Any = None
        self._folder: Any = None
        self._buttons = ipywidgets.HBox([self._save, self._delete], layout=shared(ipywidgets.Layout, flex="0 0 auto"))
        self._buttons.add_class("nbpeft-row-buttons")
        self.box = ipywidgets.HBox(
            [self._cells, self._buttons], layout=shared(ipywidgets.Layout, flex_flow="row wrap", width="100%")
        )
        self.box.add_class("nbpeft-row")

    def draw(self, adapter: AdapterState) -> None:
        """Shows the adapter as it is now."""
        self._adapter = adapter
        self._cells.value = adapter_row(adapter)
        mark(self.box, "nbpeft-on", adapter.active)

    def _toggle(self, what: str) -> None:
        """Opens the form that confirms a click, or closes it: a double click does nothing."""
        asked = self._asked
        self._close_form()
        if asked == what:
            return
        self._asked = what
        self._form = self._saving() if what == "save" else self._deleting()
        self.box.children = (self._cells, self._buttons, self._form)

    def _saving(self) -> Any:
        self._folder = ipywidgets.Text(value=f"adapters/{self._name}", placeholder="folder")
        labelled("Save to folder", self._folder, 200)
        self._folder.layout.flex = "1 1 260px"
        on_enter(self._folder, weakly(self._saved))
        return _form(
            self._folder,
            button("Save", f"Write {self._name} into this folder", weakly(self._saved), "primary"),
            button("Cancel", "Write nothing", weakly(self._close_form)),
        )

    def _deleting(self) -> Any:
        lost = " Its training is not saved." if self._adapter is not None and self._adapter.unsaved else ""
        return _form(
            html(span(Text(f"Delete {self._name}?{lost}")), flex="1 1 auto"),
            button("Delete", f"Delete {self._name} from the model", weakly(self._deleted), "danger"),
            button("Keep", f"Keep {self._name}", weakly(self._close_form), "apart"),
        )

    def _close_form(self) -> None:
        form, self._form, self._asked = self._form, None, ""
        if form is not None:
            self.box.children = (self._cells, self._buttons)
            close_tree(form)

    def _saved(self) -> None:
        folder = self._folder.value.strip()
        self._close_form()
        self._command("save", self._name, folder)

    def _deleted(self) -> None:
        self._close_form()
        self._command("delete", self._name)


def _form(*parts: Any) -> Any:
    """The form that confirms a click, on a line of its own below the row."""
    form = ipywidgets.HBox(list(parts), layout=ipywidgets.Layout(flex="1 0 100%", align_items="center"))
    form.add_class("nbpeft-form")
    return form


class Rows:
    """The head of the table, a ``Row`` for each visible adapter, and a filter if there are many.

    Args:
        command: Called with ``save`` or ``delete`` and their arguments, and with ``filter`` when other rows become
            visible.
    """

    def __init__(self, command: Command) -> None:
        self._command = command
        self._rows: dict[str, Row] = {}
        self._limit = MOST
        self._filter = labelled("Filter", ipywidgets.Text(placeholder="part of a name or a method"), 200)
        self._filter.observe(weakly(self._typed), names="value")
        self._rest = html(flex="0 0 auto")
        self._more = button("Show more", "Show more adapters", weakly(self._show_more), hides=True)
        self.filter_box = ipywidgets.HBox([self._filter, self._rest, self._more])
        self.filter_box.add_class("nbpeft-settings")
        self._titles = html(row_head(), flex="1 1 260px", min_width="0")
        self._head = ipywidgets.HBox([self._titles], layout=ipywidgets.Layout(width="100%"))
        self._head.add_class("nbpeft-head")
        self.box = ipywidgets.VBox([self._head], layout=ipywidgets.Layout(width="100%"))

    def draw(self, model: ModelState) -> tuple[str, ...]:
        """Shows a model's adapters, and returns the names of those that are visible.

        Rows of adapters that are still there are reused.
        """
        matching = [adapter for adapter in model.adapters if _matches(adapter, self._filter.value)]
        visible = matching[: self._limit]
        names = tuple(adapter.name for adapter in visible)
        self._rows = one_each(self.box, self._rows, names, lambda name: Row(name, self._command))
        for adapter in visible:
            self._rows[adapter.name].draw(adapter)
        hidden = len(matching) - len(visible)
        counts = f"{len(visible):,} of {plural(len(matching), 'adapter')}" if matching else "no adapter matches"
        self._rest.value = span(dim(counts))
        self._more.layout.display = None if hidden else "none"
        self.filter_box.layout.display = None if len(model.adapters) > MOST else "none"
        self.box.layout.display = None if names else "none"
        return names

    def _typed(self) -> None:
        self._limit = MOST
        self._command("filter")

    def _show_more(self) -> None:
        self._limit += 2 * MOST
        self._command("filter")


def _matches(adapter: AdapterState, words: str) -> bool:
    """Whether each word occurs in the text of a row."""
    text = " ".join((adapter.name, adapter.method, *adapter.summary.values(), condition(adapter))).lower()
    return all(word in text for word in words.lower().split())


class SidePanel:
    """Two buttons, and a place below that holds at most one of the panels.

    Args:
        session: The session of the panel.
        model_name: The model of the panel.
        tokenizer: A tokenizer, or a function that returns one.
        changed: Called when the content of the open panel has changed.

    Attributes:
        panel: The open panel, or None.
    """

    def __init__(
        self, session: Session, model_name: str | None, tokenizer: Any, changed: Callable[[Any], None]
    ) -> None:
        self._changed = changed
        self._session, self._name, self._tokenizer = session, model_name, tokenizer
        self.panel: AnswerPanel | None = None
        self._buttons = {kind: button(kind, words, weakly(self._toggle, kind)) for kind, (_, words) in _KINDS.items()}
        self.buttons = ipywidgets.HBox(list(self._buttons.values()), layout=ipywidgets.Layout(flex="0 1 auto"))
        self.buttons.add_class("nbpeft-foot")
        self.slot = ipywidgets.VBox([], layout=ipywidgets.Layout(width="100%", overflow="visible"))

    def close(self) -> None:
        """Closes the open panel."""
        panel, self.panel = self.panel, None
        roots, self.slot.children = self.slot.children, ()
        if panel is not None:
            panel.close()
        for root in roots:  # a panel that moved to another cell left its root here, with a line of text
            close_tree(root)
        self._mark()

    def _toggle(self, kind: str) -> None:
        # A panel that moved to another cell counts as closed here: a click opens it here again.
        shown = isinstance(self.panel, _KINDS[kind][0]) and not self.panel.closed
        prompt = self.panel.prompt if self.panel is not None else ""
        self.close()
        if shown:
            self._changed(None)
            return
        make = _KINDS[kind][0]
        self.panel = make(self._session, self._name, ui="widgets", tokenizer=self._tokenizer, prompt=prompt)
        root = self.panel.widget
        root.add_class("nbpeft-inner")
        self.slot.children = (root,)
        self.panel.on_change = functools.partial(self._changed, None)
        self._mark()
        self._changed(None)

    def _mark(self) -> None:
        for kind, opener in self._buttons.items():
            mark(opener, "nbpeft-on", isinstance(self.panel, _KINDS[kind][0]))
