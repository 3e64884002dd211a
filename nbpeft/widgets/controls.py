"""The widgets of which panels are made. They draw states and report clicks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import ipywidgets

from nbpeft.display.blocks import Text, Tone
from nbpeft.display.html import head, span
from nbpeft.errors import ConfigError
from nbpeft.state import AdapterState
from nbpeft.widgets.aria import TOGGLES
from nbpeft.widgets.lifetime import close_tree, shared, weakly
from nbpeft.widgets.styles import style_sheet

Key = TypeVar("Key")
Item = TypeVar("Item")

Command = Callable[..., None]
"""Called with the parts of a command, e.g. ``("use", "orders")``; a bound method, of which a weak reference is kept."""
_LONGEST = 26
"""The greatest number of characters of a name on a button."""


def html(value: str = "", **layout: str) -> Any:
    """An HTML widget without ipywidgets' own margins; its layout is shared, so it must not be changed."""
    style = shared(ipywidgets.HTML.style.klass)
    return ipywidgets.HTML(value, layout=shared(ipywidgets.Layout, margin="0", **layout), style=style)


def button(
    text: str, tooltip: str, handler: Callable[[Any], None], *kinds: str, width: str = "auto", hides: bool = False
) -> Any:
    """A button in the style of all panels.

    Args:
        text: Its label.
        tooltip: What a click does.
        handler: Called with the button.
        *kinds: ``primary`` for the one action of a panel, ``danger``, ``bare`` without a frame.
        width: A CSS width; by default that of the text.
        hides: Whether the button is hidden at times: it then has a layout of its own, not the shared one.
    """
    layout = ipywidgets.Layout(width=width) if hides else shared(ipywidgets.Layout, width=width)
    style = shared(ipywidgets.ButtonStyle)
    widget = ipywidgets.Button(description=text, tooltip=tooltip, layout=layout, style=style)
    for kind in kinds:
        widget.add_class(f"nbpeft-{kind}")
    widget.on_click(handler)
    return widget


def mark(widget: Any, name: str, wanted: bool) -> None:
    """Adds or removes a CSS class."""
    if wanted:
        widget.add_class(name)
    else:
        widget.remove_class(name)


def panel_root(*children: Any) -> Any:
    """The frame of a panel, with its style sheet."""
    root = ipywidgets.VBox([html(style_sheet(), display="none"), *children])
    root.add_class("nbpeft-panel")
    return root


def one_each(box: Any, old: dict[Key, Item], keys: Iterable[Key], make: Callable[[Key], Item]) -> dict[Key, Item]:
    """Gives a box one child for each key: items of known keys are reused, those of keys that are gone are closed.

    Returns:
        The items, by key.
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
        command: Called with the command of the button that was clicked.
        kind: ``choices``, of which usually one is on, or ``chips``, of which each is on or off.
        margin: The CSS margin around the row.
    """

    def __init__(self, command: Command, kind: str, margin: str = "0") -> None:
        self._command = command
        self._buttons: dict[tuple[str, ...], Any] = {}
        self.box = ipywidgets.HBox([], layout=ipywidgets.Layout(margin=margin))
        self.box.add_class(f"nbpeft-{kind}")
        self.box.add_class(TOGGLES)

    def draw(self, buttons: Mapping[tuple[str, ...], tuple[str, str]], on: Collection[tuple[str, ...]]) -> None:
        """Shows the buttons.

        Args:
            buttons: The parts of a command -> label and tooltip.
            on: The commands whose buttons are on.
        """
        self._buttons = one_each(self.box, self._buttons, buttons, lambda words: self._button(words, *buttons[words]))
        for words, made in self._buttons.items():
            mark(made, "nbpeft-on", words in on)

    def _button(self, words: tuple[str, ...], label: str, tooltip: str) -> Any:
        return button(_shortened(label), tooltip, weakly(self._command, *words))


def _shortened(name: str) -> str:
    """A name, shortened by an ellipsis in the middle: names of one experiment differ at the end."""
    if len(name) <= _LONGEST:
        return name
    end = 2 * (_LONGEST - 1) // 3
    return f"{name[: _LONGEST - 1 - end]}…{name[-end:]}"


class Message:
    """A line with an error or the result of a command, and a button that dismisses it."""

    def __init__(self) -> None:
        self._text = html(flex="1 1 auto")
        self._dismiss = button("✕", "Dismiss", weakly(self.clear), "bare")
        self.box = ipywidgets.HBox(
            [self._text, self._dismiss],
            layout=ipywidgets.Layout(display="none", align_items="center", margin="6px 0 0 0"),
        )

    def show(self, words: str, tone: Tone) -> None:
        """Shows a message."""
        self._text.value = span(Text(words, tone))
        self.box.layout.display = None

    def clear(self) -> None:
        """Hides the message."""
        self._text.value = ""
        self.box.layout.display = "none"


# Widgets of the panels in which adapters answer

CHAT_TEMPLATE: dict[str, bool | None] = {"automatic": None, "apply": True, "do not apply": False}
"""Label of the choice about the tokenizer's chat template -> ``chat`` of ``session.compare``."""


_LETTER = 6.8
"""Upper bound of the average width of a letter in a label, in pixels."""


def labelled(label: str, field: Any, width: int, tooltip: str = "") -> Any:
    """Labels a field with ipywidgets' own description, which keyboard and screen readers associate with it.

    Args:
        label: The text before the field.
        field: A field of ipywidgets.
        width: The width of the field without its label, in pixels.
        tooltip: An explanation.

    Returns:
        The field.
    """
    field.description = label
    field.style.description_width = "initial"
    field.layout.width, field.layout.margin = f"{width + round(_LETTER * len(label)) + 8}px", "0"
    if tooltip and hasattr(field, "tooltip"):  # ipywidgets 8
        field.tooltip = tooltip
    return field


def on_enter(field: Any, handler: Callable[[Any], None]) -> None:
    """Calls a function when Enter is pressed in a text field."""
    with warnings.catch_warnings():  # ipywidgets recommends to observe the value, which also changes on each key
        warnings.simplefilter("ignore", DeprecationWarning)
        field.on_submit(handler)


def settings_row(*fields: Any, margin: str = "0") -> Any:
    """A row of fields that wraps if there is no room."""
    box = ipywidgets.HBox(list(fields), layout=ipywidgets.Layout(width="100%", margin=margin))
    box.add_class("nbpeft-settings")
    return box


def tokens_field(value: int) -> Any:
    """The field for the limit of an answer, in tokens."""
    field = ipywidgets.BoundedIntText(value=value, min=1, max=4096, step=16)
    return labelled("max new tokens", field, 66, "Maximum length of an answer")


class SamplingFields:
    """Temperature, top-p and seed, with their initial values."""

    def __init__(self, temperature: float | None, top_p: float | None, seed: int | None) -> None:
        draws = temperature if temperature is not None else 0.0 if top_p is None else 1.0
        self._temperature = ipywidgets.BoundedFloatText(value=draws, min=0.0, max=10.0, step=0.1)
        self._top_p = ipywidgets.BoundedFloatText(value=1.0 if top_p is None else top_p, min=0.01, max=1.0, step=0.05)
        self._seed = ipywidgets.Text(value="" if seed is None else str(seed), placeholder="random")
        self.boxes = [
            labelled("temperature", self._temperature, 58, "0 takes the most likely token; above 0 tokens are sampled"),
            labelled("top-p", self._top_p, 58, "Sample from the most likely tokens whose probabilities add up to this"),
            labelled("seed", self._seed, 88, "The same seed gives the same answers"),
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling arguments of ``session.compare``; empty for greedy decoding.

        Raises:
            ConfigError: the seed is not a whole number.
        """
        seed, temperature = str(self._seed.value).strip(), float(self._temperature.value)
        if seed and not seed.isdecimal():
            raise ConfigError(f"seed must be a whole number, or empty for a new one each time, not {seed!r:.40}")
        if not temperature:
            return {}
        return {"temperature": temperature, "top_p": float(self._top_p.value), "seed": int(seed) if seed else None}


class Question:
    """The prompt box with the button that answers, which becomes Stop while answers are generated.

    Attributes:
        field: The prompt's widget.
    """

    def __init__(self, command: Command, prompt: str, verb: str) -> None:
        self.field = ipywidgets.Textarea(
            value=prompt,
            placeholder="A prompt",
            description="Prompt",
            rows=2,
            layout=ipywidgets.Layout(flex="1 1 220px", width="auto", margin="0", height="52px"),
        )
        self.field.add_class("nbpeft-unlabelled")
        self._ask = button(verb, "Answer this prompt", weakly(command, "run"), "primary", width="86px", hides=True)
        self._stop = button(
            "Stop", "Stop and keep the answers so far", weakly(command, "stop"), width="86px", hides=True
        )
        self._stop.layout.display = "none"
        self.box = ipywidgets.HBox(
            [self.field, self._ask, self._stop],
            layout=ipywidgets.Layout(width="100%", align_items="flex-start", margin="0 0 8px 0"),
        )
        self.box.add_class("nbpeft-question")

    @property
    def prompt(self) -> str:
        """The prompt, without surrounding white space."""
        return str(self.field.value).strip()

    def next(self, placeholder: str) -> None:
        """Clears the box, which shows a placeholder until it is filled."""
        self.field.value, self.field.placeholder = "", placeholder

    def running(self, running: bool) -> None:
        """Shows Stop while answers are generated."""
        self._ask.layout.display = "none" if running else None
        self._stop.layout.display = None if running else "none"


class PromptForm:
    """The choice whether the tokenizer's chat template is applied to the prompt."""

    def __init__(self, command: Command, chat: bool | None) -> None:
        begin = next(label for label, form in CHAT_TEMPLATE.items() if form is chat)
        self._form = ipywidgets.Dropdown(options=list(CHAT_TEMPLATE), value=begin)
        self._form.observe(weakly(command, "form"), names="value")
        self.box = labelled("chat template", self._form, 136, "automatic: as the adapters were trained in this session")

    @property
    def chat(self) -> bool | None:
        """The argument ``chat`` of ``session.compare``."""
        return CHAT_TEMPLATE[self._form.value]


class SystemField:
    """The field for the system prompt. Until it is edited, each adapter is asked with that of its training rows.

    Args:
        command: Called with ``form`` when it is edited.
        system: The initial text; None for the adapters' own.
    """

    def __init__(self, command: Command, system: str | None) -> None:
        self._command = command
        self._default = None if system is not None else ""
        self._field = ipywidgets.Textarea(value=system or "", rows=1, continuous_update=False)
        words = "Empty: no system prompt. Until it is edited, each adapter gets the one it was trained with"
        self.box = labelled("system prompt", self._field, 0, words)
        self.box.layout.width, self.box.layout.height, self.box.layout.margin = "100%", "32px", "0 0 8px 0"
        self._field.observe(weakly(self._edited), names="value")
        self.box.add_class("nbpeft-system")

    @property
    def system(self) -> str | None:
        """The argument ``system`` of ``session.compare``."""
        return None if self._field.value == self._default else str(self._field.value).strip()

    def draw(self, adapters: Iterable[AdapterState]) -> None:
        """Shows the system prompt that the adapters have in common, unless the field was edited."""
        systems = {item.system for item in adapters if item.system is not None}
        several = len(systems) > 1
        self._field.placeholder = "of each adapter's training rows" if several else "none"
        former, self._default = self._default, "" if several or not systems else str(systems.pop())
        if self._field.value == former:
            self._field.value = self._default

    def _edited(self) -> None:
        if self._field.value != self._default:
            self._command("form")


class Frame:
    """A card: title, the panel's own widgets, answers, widgets below them, and a message."""

    def __init__(self, title: str, *blocks: Any, below: Iterable[Any] = ()) -> None:
        self._title = title
        self._head = html()
        self.answers = html()
        self.message = Message()
        self.root = panel_root(self._head, *blocks, self.answers, *below, self.message.box)
        self.head("")

    def head(self, aside: str, *, running: bool = False) -> None:
        """Draws the title line.

        Args:
            aside: Plain text on the right.
            running: Whether the text describes work in progress, which is drawn in the accent colour.
        """
        self._head.value = head(self._title, Text(aside, "accent" if running else "dim"), below=8)
