"""Widgets of the blend panel."""

from __future__ import annotations

from typing import Any

import ipywidgets

from nbpeft.display.blocks import Text, dim, line
from nbpeft.display.html import span, to_html
from nbpeft.errors import NbpeftError
from nbpeft.session.results.comparing import CompareResult
from nbpeft.state import ModelState
from nbpeft.widgets.controls import (
    Command,
    Frame,
    PromptForm,
    Question,
    button,
    html,
    labelled,
    one_each,
    settings_row,
    tokens_field,
)
from nbpeft.widgets.lifetime import weakly

TYPES = (
    ("exact sum", "exact"),
    ("TIES", "ties"),
    ("TIES on deltas", "ties_svd"),
    ("DARE", "dare_linear"),
    ("DARE on deltas", "dare_linear_svd"),
    ("DARE + TIES", "dare_ties"),
    ("DARE + TIES on deltas", "dare_ties_svd"),
)
LOW, HIGH, STEP = -1.0, 1.5, 0.05
MARKS = (-1.0, 0.0, 0.5, 1.0, 1.5)
"""Weights that stand below the sliders."""


class Slider:
    """The weight of one adapter.

    Args:
        name: The adapter.
        value: To begin with.
        command: Called with ``moved``.
    """

    def __init__(self, name: str, value: float, command: Command) -> None:
        label = html(span(Text(name, tooltip=name, wrap="cut")))
        label.add_class("nbpeft-label")
        self._slider = ipywidgets.FloatSlider(
            value=min(max(value, LOW), HIGH),
            min=LOW,
            max=HIGH,
            step=STEP,
            readout_format=".2f",
            layout=ipywidgets.Layout(flex="1 1 auto", width="auto", margin="0"),
        )
        self._slider.add_class("nbpeft-weight")
        self._slider.observe(weakly(command, "moved"), names="value")
        self.box = ipywidgets.HBox([label, self._slider], layout=ipywidgets.Layout(width="100%", align_items="center"))

    @property
    def weight(self) -> float:
        """Where it stands."""
        return round(float(self._slider.value), 4)


def scale() -> Any:
    """The scale below the sliders."""
    places = {f"{mark:g}": 100 * (mark - LOW) / (HIGH - LOW) for mark in MARKS}
    marks = "".join(f'<span style="left:{place:.0f}%">{mark}</span>' for mark, place in places.items())
    label = html(span(dim("weight")))
    label.add_class("nbpeft-label")
    marked = html(f'<div class="nbpeft-scale">{marks}</div>', flex="1 1 auto")
    return ipywidgets.HBox([label, marked], layout=ipywidgets.Layout(width="100%"))


class BlendControls:
    """The widgets of the panel.

    Args:
        title: Of the panel.
        command: Called with ``moved``, ``run``, ``stop`` or ``save``.
        prompt: To begin with.
        tokens: Longest answer to begin with.
        chat: How the prompt is sent, to begin with.
    """

    def __init__(self, title: str, command: Command, prompt: str, tokens: int, chat: bool | None) -> None:
        self._command = command
        self._sliders: dict[str, Slider] = {}
        self.question = Question(command, prompt, "Answer")
        self._rows = ipywidgets.VBox([], layout=ipywidgets.Layout(width="100%"))
        self._scale = scale()
        self.form = PromptForm(command, chat)
        settings, save = self._make_settings(command, tokens), self._make_save(command)
        self.frame = Frame(title, self.question.box, self._rows, self._scale, settings, below=(save,))
        self.root, self.message = self.frame.root, self.frame.message

    def _make_settings(self, command: Command, tokens: int) -> Any:
        self._type = labelled("combination type", ipywidgets.Dropdown(options=TYPES, value="exact"), 168)
        self._type.observe(weakly(self._type_chosen), names="value")
        self._density = labelled(
            "density", ipywidgets.BoundedFloatText(value=0.5, min=0.05, max=1.0, step=0.05), 66, "Share of weights kept"
        )
        self._density.observe(weakly(command, "moved"), names="value")
        self._density.layout.display = "none"
        self._tokens = tokens_field(tokens)
        return settings_row(self._type, self._density, self._tokens, self.form.box, margin="6px 0 0 0")

    def _make_save(self, command: Command) -> Any:
        self._name = labelled("new adapter", ipywidgets.Text(value="blend", placeholder="name"), 140)
        self._rank = labelled("rank", ipywidgets.Text(value="", placeholder="all"), 52, "Empty: as large as it takes")
        save = button("Save as adapter", "Make an adapter of this blend", weakly(command, "save"))
        return settings_row(self._name, self._rank, save, margin="10px 0 0 0")

    # What the widgets say

    @property
    def weights(self) -> dict[str, float]:
        """Adapter -> weight, those at 0 left out."""
        return {name: slider.weight for name, slider in self._sliders.items() if slider.weight}

    @property
    def type(self) -> str:
        """How to combine."""
        return str(self._type.value)

    @property
    def density(self) -> float:
        """Share of the entries that TIES and DARE keep."""
        return float(self._density.value)

    @property
    def tokens(self) -> int:
        """Longest answer."""
        return int(self._tokens.value)

    @property
    def name(self) -> str:
        """Of the new adapter."""
        return str(self._name.value).strip()

    @property
    def rank(self) -> int | None:
        """Of the new adapter; None: as large as it takes.

        Raises:
            NbpeftError: it is no number.
        """
        text = str(self._rank.value).strip()
        if text in ("", "all"):
            return None
        if not text.isdecimal() or int(text) == 0:
            raise NbpeftError(f"The rank is {text!r}, expected a whole number, or nothing to lose nothing.")
        return int(text)

    # What they show

    def draw(self, model: ModelState | None, missing: str) -> None:
        """A slider for each adapter; those that stayed keep their place."""
        names = [item.name for item in model.adapters] if model is not None else []
        active = model.active if model is not None and not self._sliders else ()
        self._sliders = one_each(
            self._rows, self._sliders, names, lambda name: Slider(name, float(name in active), self._command)
        )
        self._scale.layout.display = None if names else "none"
        if missing:
            self.frame.answers.value = to_html(line(dim(missing)))
        elif not names:
            self.frame.answers.value = to_html(line(dim("No adapters to blend yet.")))

    def show(self, result: CompareResult) -> None:
        """Shows the answers."""
        running = result.status == "running"
        self.frame.head("answering …" if running else result.aside, running=running)
        self.frame.answers.value = to_html(result.blocks(shown=self.question.prompt))

    def _type_chosen(self) -> None:
        exact = self.type == "exact"
        self._density.layout.display = "none" if exact else None
        self._rank.layout.display = None if exact else "none"
        self._command("moved")
