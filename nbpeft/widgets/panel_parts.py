"""Widgets that the adapters panel is made of. They draw what they are told and report clicks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets

from nbpeft.state import AdapterState, ModelState
from nbpeft.widgets import views
from nbpeft.widgets.lifetime import close_tree, weakly

BASE = "base"

Command = Callable[..., None]
"""Called with the words of a command, e.g. ``("use", "orders")``; a bound method, held weakly."""


def html(value: str = "", **layout: str) -> Any:
    """An HTML widget without ipywidgets' own margins."""
    return ipywidgets.HTML(value, layout=ipywidgets.Layout(margin="0", **layout))


def small_button(text: str, tooltip: str, width: str, handler: Callable[[Any], None]) -> Any:
    """A small button as it stands in rows."""
    button = ipywidgets.Button(description=text, tooltip=tooltip, layout=ipywidgets.Layout(width=width))
    button.add_class("nbpeft-small")
    button.on_click(handler)
    return button


def mark(widget: Any, name: str, wanted: bool) -> None:
    """Sets or drops a CSS class."""
    if wanted:
        widget.add_class(name)
    else:
        widget.remove_class(name)


class Choices:
    """A row of buttons, one of which (or several) is on: the base model and every adapter."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._base = self._button(BASE, "Only the base model acts", "off")
        self._buttons: dict[str, Any] = {}
        self.box = ipywidgets.HBox([self._base], layout=ipywidgets.Layout(margin="0 0 6px 0"))
        self.box.add_class("nbpeft-choices")

    def draw(self, model: ModelState) -> None:
        """Shows which adapters act."""
        names = [adapter.name for adapter in model.adapters]
        if names != list(self._buttons):
            old = self._buttons
            self._buttons = {
                name: old.get(name) or self._button(name, f"Switch to {name}", "use", name) for name in names
            }
            self.box.children = (self._base, *self._buttons.values())
            for name in old.keys() - self._buttons.keys():
                close_tree(old[name])
        for name, button in self._buttons.items():
            mark(button, "nbpeft-on", name in model.active)
        mark(self._base, "nbpeft-on", not model.active)

    def _button(self, text: str, tooltip: str, *command: str) -> Any:
        button = ipywidgets.Button(description=text, tooltip=tooltip, layout=ipywidgets.Layout(width="auto"))
        button.on_click(weakly(self._command, *command))
        return button


class Row:
    """One adapter with its save and delete buttons, and what they ask back."""

    def __init__(self, adapter: AdapterState, command: Command) -> None:
        self._name = adapter.name
        self._command = command
        self._confirming = False
        self._cells = html(flex="1 1 0%", min_width="0")
        self._first = small_button("save", "", "58px", weakly(self._first_clicked))
        self._second = small_button("delete", "", "58px", weakly(self._second_clicked))
        self._form: Any = None
        self._folder: Any = None
        self.box = ipywidgets.HBox(
            [self._cells, self._first, self._second], layout=ipywidgets.Layout(flex_flow="row wrap", width="100%")
        )
        self.box.add_class("nbpeft-row")
        self._label()

    def draw(self, adapter: AdapterState, acts: bool) -> None:
        """Shows the adapter.

        Args:
            adapter: As it is now.
            acts: Whether it is active.
        """
        self._cells.value = views.adapter_row(adapter)
        mark(self.box, "nbpeft-on", acts)

    def close(self) -> None:
        """Frees the widgets."""
        self._close_form()
        close_tree(self.box)

    def _first_clicked(self) -> None:
        if self._confirming:
            self._confirm(False)
            self._command("delete", self._name)
        elif self._form is not None:
            self._close_form()
        else:
            self._open_form()

    def _second_clicked(self) -> None:
        self._close_form()
        # The confirming button is the other one, so that a double click deletes nothing.
        self._confirm(not self._confirming)

    def _confirm(self, confirming: bool) -> None:
        self._confirming = confirming
        self._label()

    def _label(self) -> None:
        asked = self._confirming
        self._first.description, self._second.description = ("Delete?", "keep") if asked else ("save", "delete")
        self._first.tooltip = f"Take {self._name} out of the model" if asked else f"Save {self._name} to a folder"
        self._second.tooltip = f"Keep {self._name}" if asked else f"Delete {self._name}"
        mark(self._first, "nbpeft-danger", asked)

    def _open_form(self) -> None:
        self._folder = ipywidgets.Text(
            value=f"adapters/{self._name}",
            placeholder="folder",
            layout=ipywidgets.Layout(flex="1 1 auto", width="auto", margin="0"),
        )
        self._form = ipywidgets.HBox(
            [
                html('<span style="padding:0 8px;white-space:nowrap">Save to folder</span>'),
                self._folder,
                small_button("Save", f"Write {self._name} into this folder", "58px", weakly(self._save)),
                small_button("cancel", "Write nothing", "58px", weakly(self._close_form)),
            ],
            layout=ipywidgets.Layout(flex="1 0 100%", align_items="center", padding="0 0 6px 0"),
        )
        self.box.children = (self._cells, self._first, self._second, self._form)

    def _close_form(self) -> None:
        form, self._form = self._form, None
        if form is not None:
            self.box.children = (self._cells, self._first, self._second)
            close_tree(form)

    def _save(self) -> None:
        folder = self._folder.value.strip()
        self._close_form()
        self._command("save", self._name, folder)


class Rows:
    """The table of adapters: a head and one ``Row`` each."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._rows: dict[str, Row] = {}
        head = html(views.row_head(), flex="1 1 0%", min_width="0")
        gap = html(width="124px")  # two buttons of 58 px and their margins of 4 px
        self._head = ipywidgets.HBox([head, gap], layout=ipywidgets.Layout(width="100%"))
        self._head.add_class("nbpeft-row")
        self.box = ipywidgets.VBox([self._head], layout=ipywidgets.Layout(width="100%"))

    def draw(self, model: ModelState) -> None:
        """Shows a model's adapters; rows of adapters that stayed are kept."""
        names = [adapter.name for adapter in model.adapters]
        if names != list(self._rows):
            old = self._rows
            self._rows = {
                adapter.name: old.get(adapter.name) or Row(adapter, self._command) for adapter in model.adapters
            }
            self.box.children = (self._head, *(row.box for row in self._rows.values()))
            for name in old.keys() - self._rows.keys():
                old[name].close()
        for adapter in model.adapters:
            self._rows[adapter.name].draw(adapter, adapter.name in model.active)
        self.box.layout.display = None if names else "none"


class Message:
    """A line that says what went wrong, or what was done, with a button that dismisses it."""

    def __init__(self) -> None:
        self._text = html(flex="1 1 auto")
        self._dismiss = small_button("✕", "Dismiss", "22px", weakly(self.clear))
        self._dismiss.add_class("nbpeft-bare")
        self.box = ipywidgets.HBox(
            [self._text, self._dismiss],
            layout=ipywidgets.Layout(display="none", align_items="center", margin="6px 0 0 0"),
        )

    def show(self, value: str) -> None:
        """Shows HTML."""
        self._text.value = value
        self.box.layout.display = None

    def clear(self) -> None:
        """Shows nothing."""
        self._text.value = ""
        self.box.layout.display = "none"
