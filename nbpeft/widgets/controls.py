"""Widgets that panels are made of. They draw states and report clicks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import ipywidgets

from nbpeft.display.blocks import Span, Text, Tone, dim
from nbpeft.display.html import grid_row, head, span
from nbpeft.display.models import adapter_cells, adapter_head, condition
from nbpeft.state import AdapterState, ModelState
from nbpeft.widgets.lifetime import close_tree, weakly
from nbpeft.widgets.styles import PANEL_CSS

Key = TypeVar("Key")
Item = TypeVar("Item")

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


def panel_root(*children: Any) -> Any:
    """The frame of a panel, with its style sheet."""
    root = ipywidgets.VBox([html(f"<style>{PANEL_CSS}</style>", display="none"), *children])
    root.add_class("nbpeft-panel")
    return root


def one_each(box: Any, old: dict[Key, Item], keys: Iterable[Key], make: Callable[[Key], Item]) -> dict[Key, Item]:
    """Gives a box one child for each key; those of keys that stayed are kept, the others are closed.

    Args:
        box: The box.
        old: The items in it, widgets or objects with a ``box``.
        keys: What it is to hold.
        make: Makes the item of a new key.
    """
    new = {key: old[key] if key in old else make(key) for key in keys}
    if list(new) != list(old):
        others = box.children[: len(box.children) - len(old)]
        box.children = (*others, *(getattr(item, "box", item) for item in new.values()))
        for key in old.keys() - new.keys():
            close_tree(getattr(old[key], "box", old[key]))
    return new


class ToggleRow:
    """A row of buttons that are on or off, e.g. the base model and every adapter.

    Args:
        command: Called with the words of the button that was clicked.
        margin: Around the row.
    """

    def __init__(self, command: Command, margin: str = "0") -> None:
        self._command = command
        self._buttons: dict[tuple[str, ...], Any] = {}
        self.box = ipywidgets.HBox([], layout=ipywidgets.Layout(margin=margin))
        self.box.add_class("nbpeft-choices")

    def draw(self, buttons: Mapping[tuple[str, ...], tuple[str, str]], on: Collection[tuple[str, ...]]) -> None:
        """Shows the buttons.

        Args:
            buttons: Words of the command -> label and tooltip.
            on: Those that are on.
        """
        self._buttons = one_each(self.box, self._buttons, buttons, lambda words: self._button(words, *buttons[words]))
        for words, button in self._buttons.items():
            mark(button, "nbpeft-on", words in on)

    def _button(self, words: tuple[str, ...], label: str, tooltip: str) -> Any:
        button = ipywidgets.Button(description=label, tooltip=tooltip, layout=ipywidgets.Layout(width="auto"))
        button.on_click(weakly(self._command, *words))
        return button


class Row:
    """One adapter with its save and delete buttons, and what they ask back."""

    def __init__(self, name: str, command: Command) -> None:
        self._name = name
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

    def draw(self, adapter: AdapterState, titles: Sequence[str]) -> None:
        """Shows the adapter.

        Args:
            adapter: As it is now.
            titles: Of the columns.
        """
        self._cells.value = adapter_row(adapter, titles)
        mark(self.box, "nbpeft-on", adapter.active)

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


_COLUMNS = ("", "nbpeft-extra", "nbpeft-number", "nbpeft-extra", "nbpeft-number", "nbpeft-number nbpeft-extra", "")
"""CSS classes of the columns of the table of adapters; the style sheet lays them out."""


def row_head(titles: Sequence[str]) -> str:
    """The titles of the table of adapters."""
    return grid_row((dim(title), kind) for title, kind in zip(titles, _COLUMNS, strict=True))


def adapter_row(adapter: AdapterState, titles: Sequence[str]) -> str:
    """One adapter in the table; its colour says whether it is active."""
    _, *cells, _ = adapter_cells(adapter, titles)
    state = condition(adapter, with_active=False)
    shown: list[Span] = [
        Text(adapter.name, "bold" if adapter.active else "", adapter.name),
        *cells,
        Text(state, "" if adapter.trainable or adapter.unsaved else "dim", state),
    ]
    return grid_row(zip(shown, _COLUMNS, strict=True))


class Rows:
    """The table of adapters: a head and one ``Row`` each."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._rows: dict[str, Row] = {}
        self._titles = html(flex="1 1 0%", min_width="0")
        gap = html(width="124px")  # two buttons of 58 px and their margins of 4 px
        self._head = ipywidgets.HBox([self._titles, gap], layout=ipywidgets.Layout(width="100%"))
        self._head.add_class("nbpeft-row")
        self.box = ipywidgets.VBox([self._head], layout=ipywidgets.Layout(width="100%"))

    def draw(self, model: ModelState) -> None:
        """Shows a model's adapters; rows of adapters that stayed are kept."""
        names = [adapter.name for adapter in model.adapters]
        self._rows = one_each(self.box, self._rows, names, lambda name: Row(name, self._command))
        titles = adapter_head(model.adapters)
        self._titles.value = row_head(titles)
        for adapter in model.adapters:
            self._rows[adapter.name].draw(adapter, titles)
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

    def show(self, words: str, tone: Tone) -> None:
        """Shows words."""
        self._text.value = span(Text(words, tone))
        self.box.layout.display = None

    def clear(self) -> None:
        """Shows nothing."""
        self._text.value = ""
        self.box.layout.display = "none"


# Of the panels whose adapters answer

FORMS: dict[str, bool | None] = {"automatic": None, "chat message": True, "plain text": False}
"""How a prompt is sent -> ``chat`` of ``session.compare``."""


def settings_label(text: str) -> Any:
    """The words before a field."""
    return html(span(Text(text, "dim", wrap="never")))


def pair(label: str, field: Any) -> Any:
    """A field with its label, kept together where lines wrap."""
    return ipywidgets.HBox([settings_label(label), field], layout=ipywidgets.Layout(align_items="center"))


def tokens_field(value: int) -> Any:
    """The greatest length of an answer."""
    return ipywidgets.BoundedIntText(value=value, min=1, max=4096, step=16, layout=field_layout("76px"))


def field_layout(width: str) -> Any:
    """Layout of a small field."""
    return ipywidgets.Layout(width=width, margin="0 0 0 6px")


def action_button(text: str, tooltip: str, width: str, handler: Callable[[Any], None], *, primary: bool = False) -> Any:
    """A button that does what the panel is for."""
    button = ipywidgets.Button(description=text, tooltip=tooltip, layout=ipywidgets.Layout(width=width))
    button.add_class("nbpeft-action")
    mark(button, "nbpeft-primary", primary)
    button.on_click(handler)
    return button


class Question:
    """The prompt box with the button that answers, which becomes Stop while answers come.

    Args:
        command: Called with ``run`` or ``stop``.
        prompt: To begin with.
        verb: What the button says.
    """

    def __init__(self, command: Command, prompt: str, verb: str) -> None:
        self._prompt = ipywidgets.Textarea(
            value=prompt,
            placeholder="A prompt",
            rows=2,
            layout=ipywidgets.Layout(flex="1 1 auto", width="auto", margin="0", height="52px"),
        )
        self._ask = action_button(verb, "Answer this prompt", "86px", weakly(command, "run"), primary=True)
        self._stop = action_button("Stop", "Keep the answers so far", "86px", weakly(command, "stop"))
        self._stop.layout.display = "none"
        self.box = ipywidgets.HBox(
            [self._prompt, self._ask, self._stop],
            layout=ipywidgets.Layout(width="100%", align_items="flex-start", margin="0 0 8px 0"),
        )

    @property
    def prompt(self) -> str:
        """What is asked."""
        return str(self._prompt.value).strip()

    @property
    def field(self) -> Any:
        """The prompt's widget."""
        return self._prompt

    def running(self, running: bool) -> None:
        """Shows Stop while answers come."""
        self._ask.layout.display = "none" if running else None
        self._stop.layout.display = None if running else "none"


class PromptForm:
    """Whether the prompt goes into the tokenizer's chat template, or to the model as it is.

    Args:
        command: Called with ``form`` when it changes.
        chat: What it begins with; see ``session.compare``.
    """

    def __init__(self, command: Command, chat: bool | None) -> None:
        begin = next(label for label, form in FORMS.items() if form is chat)
        self._form = ipywidgets.Dropdown(options=list(FORMS), value=begin, layout=field_layout("146px"))
        self._form.tooltip = "automatic: as the adapters were trained on text in this session"
        self._form.observe(weakly(command, "form"), names="value")
        self.box = pair("sent as", self._form)

    @property
    def chat(self) -> bool | None:
        """For ``session.compare``."""
        return FORMS[self._form.value]


class Frame:
    """A card: title, the panel's own widgets, answers, and a message."""

    def __init__(self, title: str, *blocks: Any) -> None:
        self._title = title
        self._head = html()
        self.answers = html()
        self.message = Message()
        self.root = panel_root(self._head, *blocks, self.answers, self.message.box)
        self.head("")

    def head(self, aside: str, *, running: bool = False) -> None:
        """Draws the title line.

        Args:
            aside: Plain text on the right.
            running: Whether it says what is going on now.
        """
        self._head.value = head(self._title, Text(aside, "accent" if running else "dim"), below=8)
