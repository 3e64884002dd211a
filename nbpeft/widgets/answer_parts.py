"""Widgets that the compare and the blend panel are made of. They draw what they are told and report clicks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets

from nbpeft.session import render
from nbpeft.widgets import styles
from nbpeft.widgets.lifetime import close_tree, weakly
from nbpeft.widgets.panel_parts import Command, Message, html, mark

CSS = f"""
{styles.PANEL_CSS}
.nbpeft-panel textarea, .nbpeft-panel input, .nbpeft-panel select {{ font-size: 13px; }}
.nbpeft-panel select {{ appearance: auto; background-image: none; }}
.nbpeft-panel textarea {{ line-height: 1.4; padding: 5px 8px; box-sizing: border-box; }}
.nbpeft-panel .nbpeft-action {{ height: 28px; line-height: 26px; padding: 0 10px; margin: 0 0 0 8px; flex: 0 0 auto;
  border: 1px solid {styles.BORDER}; border-radius: 3px; background: {styles.FILL}; color: {styles.TEXT}; }}
.nbpeft-panel .jupyter-button.nbpeft-primary, .nbpeft-panel .jupyter-button.nbpeft-primary:hover:enabled {{
  background: {styles.ACCENT}; border-color: {styles.ACCENT}; color: {styles.ON_ACCENT}; }}
.nbpeft-inner {{ margin-top: 12px; max-width: none; }}
.nbpeft-settings {{ flex-wrap: wrap; align-items: center; gap: 4px 14px; overflow: visible; }}
.nbpeft-settings > * {{ flex: 0 0 auto; }}
"""
"""Style sheet of these panels."""

FORMS: dict[str, bool | None] = {"automatic": None, "chat message": True, "plain text": False}
"""How a prompt is sent -> ``chat`` of ``session.compare``."""


def settings_label(text: str) -> Any:
    """The words before a field."""
    return html(f'<span style="color:{styles.DIM};white-space:nowrap">{escape(text)}</span>')


def pair(label: str, field: Any) -> Any:
    """A field with its label, kept together where lines wrap."""
    return ipywidgets.HBox([settings_label(label), field], layout=ipywidgets.Layout(align_items="center"))


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


class Picks:
    """A row of buttons that are on or off: which columns there are.

    Args:
        command: Called with ``pick`` and a name.
    """

    def __init__(self, command: Command) -> None:
        self._command = command
        self._buttons: dict[str, Any] = {}
        self.box = ipywidgets.HBox([], layout=ipywidgets.Layout(margin="0"))
        self.box.add_class("nbpeft-choices")

    def draw(self, names: Sequence[str], chosen: Sequence[str]) -> None:
        """Shows the names, those chosen as on."""
        if list(names) != list(self._buttons):
            old = self._buttons
            self._buttons = {name: old.get(name) or self._button(name) for name in names}
            self.box.children = tuple(self._buttons.values())
            for name in old.keys() - self._buttons.keys():
                close_tree(old[name])
        for name, button in self._buttons.items():
            mark(button, "nbpeft-on", name in chosen)

    def _button(self, name: str) -> Any:
        button = ipywidgets.Button(
            description=name, tooltip=f"With or without {name}", layout=ipywidgets.Layout(width="auto")
        )
        button.on_click(weakly(self._command, "pick", name))
        return button


class Frame:
    """A card: title, the panel's own widgets, answers, and a message."""

    def __init__(self, title: str, *blocks: Any) -> None:
        self._title = title
        self._head = html()
        self.answers = html()
        self.message = Message()
        style = html(f"<style>{CSS}</style>", display="none")
        self.root = ipywidgets.VBox([style, self._head, *blocks, self.answers, self.message.box])
        self.root.add_class("nbpeft-panel")
        self.head("")

    def head(self, aside: str, *, running: bool = False) -> None:
        """Draws the title line.

        Args:
            aside: Plain text on the right.
            running: Whether it tells what goes on now.
        """
        words = render.accent(aside) if running else render.dim(aside)
        self._head.value = (
            '<div style="display:flex;justify-content:space-between;gap:16px;align-items:baseline;margin-bottom:8px">'
            f'<b style="font-weight:600;color:{styles.STRONG}">{escape(self._title)}</b>{words}</div>'
        )
