"""Widgets that panels are made of. They draw states and report clicks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import ipywidgets

from nbpeft.display.blocks import Text, Tone
from nbpeft.display.html import head, span
from nbpeft.display.names import shortened
from nbpeft.errors import ConfigError
from nbpeft.widgets.lifetime import close_tree, shared, weakly
from nbpeft.widgets.styles import style_sheet

Key = TypeVar("Key")
Item = TypeVar("Item")

Command = Callable[..., None]
"""Called with the words of a command, e.g. ``("use", "orders")``; a bound method, held weakly."""


def html(value: str = "", **layout: str) -> Any:
    """An HTML widget without ipywidgets' own margins; its layout stays as it is."""
    style = shared(ipywidgets.HTML.style.klass)
    return ipywidgets.HTML(value, layout=shared(ipywidgets.Layout, margin="0", **layout), style=style)


def button(
    text: str, tooltip: str, handler: Callable[[Any], None], *kinds: str, width: str = "auto", hides: bool = False
) -> Any:
    """A button as it stands in every panel.

    Args:
        text: What it says.
        tooltip: What a click does.
        handler: Called with the button.
        *kinds: ``primary`` for the one action of a panel, ``danger``, ``bare`` without a frame.
        width: As CSS; by default what the text takes.
        hides: Whether it is hidden at times: its layout is its own then, and not that of all buttons.
    """
    layout = ipywidgets.Layout(width=width) if hides else shared(ipywidgets.Layout, width=width)
    style = shared(ipywidgets.ButtonStyle)
    made = ipywidgets.Button(description=text, tooltip=tooltip, layout=layout, style=style)
    for kind in kinds:
        made.add_class(f"nbpeft-{kind}")
    made.on_click(handler)
    return made


def mark(widget: Any, name: str, wanted: bool) -> None:
    """Sets or drops a CSS class."""
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
        kind: ``choices``, of which one is on as a rule, or ``chips``, of which each is on or off.
        margin: Around the row.
    """

    def __init__(self, command: Command, kind: str, margin: str = "0") -> None:
        self._command = command
        self._buttons: dict[tuple[str, ...], Any] = {}
        self.box = ipywidgets.HBox([], layout=ipywidgets.Layout(margin=margin))
        self.box.add_class(f"nbpeft-{kind}")

    def draw(self, buttons: Mapping[tuple[str, ...], tuple[str, str]], on: Collection[tuple[str, ...]]) -> None:
        """Shows the buttons.

        Args:
            buttons: Words of the command -> label and tooltip.
            on: Those that are on.
        """
        self._buttons = one_each(self.box, self._buttons, buttons, lambda words: self._button(words, *buttons[words]))
        for words, made in self._buttons.items():
            mark(made, "nbpeft-on", words in on)

    def _button(self, words: tuple[str, ...], label: str, tooltip: str) -> Any:
        return button(shortened(label), tooltip, weakly(self._command, *words))


class Message:
    """A line that says what went wrong, or what was done, with a button that dismisses it."""

    def __init__(self) -> None:
        self._text = html(flex="1 1 auto")
        self._dismiss = button("✕", "Dismiss", weakly(self.clear), "bare")
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

CHAT_TEMPLATE: dict[str, bool | None] = {"automatic": None, "apply": True, "do not apply": False}
"""What is done with the tokenizer's chat template -> ``chat`` of ``session.compare``."""


_LETTER = 6.8
"""Pixels that a letter of a label takes at most, on average."""


def labelled(label: str, field: Any, width: int, tooltip: str = "") -> Any:
    """Gives a field its label, which belongs to it for the keyboard and for screen readers, too.

    Args:
        label: Before the field.
        field: Of ipywidgets.
        width: Of the field without its label, in pixels.
        tooltip: More about it.
    """
    field.description = label
    field.style.description_width = "initial"
    field.layout.width, field.layout.margin = f"{width + round(_LETTER * len(label)) + 8}px", "0"
    if tooltip and hasattr(field, "tooltip"):  # ipywidgets 8
        field.tooltip = tooltip
    return field


def settings_row(*fields: Any, margin: str = "0") -> Any:
    """Fields beside each other, and below each other where there is no room."""
    box = ipywidgets.HBox(list(fields), layout=ipywidgets.Layout(width="100%", margin=margin))
    box.add_class("nbpeft-settings")
    return box


def tokens_field(value: int) -> Any:
    """The greatest length of an answer."""
    field = ipywidgets.BoundedIntText(value=value, min=1, max=4096, step=16)
    return labelled("max new tokens", field, 66, "Longest answer")


class SamplingFields:
    """Temperature, top-p and seed.

    Args:
        temperature: To begin with; 0 is greedy.
        top_p: To begin with.
        seed: To begin with; None for another one each time.
    """

    def __init__(self, temperature: float | None, top_p: float | None, seed: int | None) -> None:
        draws = temperature if temperature is not None else 0.0 if top_p is None else 1.0
        self._temperature = ipywidgets.BoundedFloatText(value=draws, min=0.0, max=10.0, step=0.1)
        self._top_p = ipywidgets.BoundedFloatText(value=1.0 if top_p is None else top_p, min=0.01, max=1.0, step=0.05)
        self._seed = ipywidgets.Text(value="" if seed is None else str(seed), placeholder="random")
        self.boxes = [
            labelled("temperature", self._temperature, 58, "0 takes the likeliest token; above 0 tokens are drawn"),
            labelled("top-p", self._top_p, 58, "Draw among the likeliest tokens of this probability together"),
            labelled("seed", self._seed, 88, "The same seed draws the same answers"),
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """For ``session.compare``; nothing where greedy.

        Raises:
            ConfigError: the seed is not a number.
        """
        seed, temperature = str(self._seed.value).strip(), float(self._temperature.value)
        if seed and not seed.isdecimal():
            raise ConfigError(f"seed must be a whole number, or empty for another one each time, not {seed!r:.40}")
        if not temperature:
            return {}
        return {"temperature": temperature, "top_p": float(self._top_p.value), "seed": int(seed) if seed else None}


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
            description="Prompt",
            rows=2,
            layout=ipywidgets.Layout(flex="1 1 220px", width="auto", margin="0", height="52px"),
        )
        self._prompt.add_class("nbpeft-unlabelled")
        self._ask = button(verb, "Answer this prompt", weakly(command, "run"), "primary", width="86px", hides=True)
        self._stop = button("Stop", "Keep the answers so far", weakly(command, "stop"), width="86px", hides=True)
        self._stop.layout.display = "none"
        self.box = ipywidgets.HBox(
            [self._prompt, self._ask, self._stop],
            layout=ipywidgets.Layout(width="100%", align_items="flex-start", margin="0 0 8px 0"),
        )
        self.box.add_class("nbpeft-question")

    @property
    def prompt(self) -> str:
        """What is asked."""
        return str(self._prompt.value).strip()

    @property
    def field(self) -> Any:
        """The prompt's widget."""
        return self._prompt

    def next(self, placeholder: str) -> None:
        """Empties the box."""
        self._prompt.value, self._prompt.placeholder = "", placeholder

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
        begin = next(label for label, form in CHAT_TEMPLATE.items() if form is chat)
        self._form = ipywidgets.Dropdown(options=list(CHAT_TEMPLATE), value=begin)
        self._form.observe(weakly(command, "form"), names="value")
        self.box = labelled("chat template", self._form, 136, "automatic: as the adapters were trained in this session")

    @property
    def chat(self) -> bool | None:
        """For ``session.compare``."""
        return CHAT_TEMPLATE[self._form.value]


class Frame:
    """A card: title, the panel's own widgets, answers, what stands below them, and a message."""

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
            running: Whether it says what is going on now.
        """
        self._head.value = head(self._title, Text(aside, "accent" if running else "dim"), below=8)
