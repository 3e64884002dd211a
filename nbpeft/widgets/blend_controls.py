"""Widgets of the blend panel."""

from __future__ import annotations

from typing import Any

import ipywidgets

from nbpeft.display.blocks import Text, dim, line
from nbpeft.display.html import span, to_html
from nbpeft.errors import NbpeftError
from nbpeft.session.results.comparing import CompareResult
from nbpeft.state import ModelState
from nbpeft.widgets.aria import SLIDER
from nbpeft.widgets.controls import (
    Command,
    Frame,
    PromptForm,
    Question,
    SystemField,
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
"""The weights that label the scale below the sliders."""


class Slider:
    """The weight of one adapter."""

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
        self.box.add_class(SLIDER)

    @property
    def weight(self) -> float:
        """The weight the slider is set to."""
        return round(float(self._slider.value), 4)


def scale() -> Any:
    """The scale below the sliders."""
    positions = {f"{mark:g}": 100 * (mark - LOW) / (HIGH - LOW) for mark in MARKS}
    marks = "".join(f'<span style="left:{place:.0f}%">{mark}</span>' for mark, place in positions.items())
    label = html(span(dim("weight")))
    label.add_class("nbpeft-label")
    marked = html(f'<div class="nbpeft-scale">{marks}</div>', flex="1 1 auto")
    return ipywidgets.HBox([label, marked], layout=ipywidgets.Layout(width="100%"))


class BlendControls:
    """The widgets of the panel, which call ``moved``, ``run``, ``stop`` and ``save``; see ``AnswerPanel``."""

    def __init__(
        self, title: str, command: Command, prompt: str, tokens: int, chat: bool | None, system: str | None
    ) -> None:
        self._command = command
        self._sliders: dict[str, Slider] = {}
        self.question = Question(command, prompt, "Answer")
        self.system = SystemField(command, system)
        self._rows = ipywidgets.VBox([], layout=ipywidgets.Layout(width="100%"))
        self._scale = scale()
        self.form = PromptForm(command, chat)
        settings, save = self._make_settings(command, tokens), self._make_save(command)
        self.frame = Frame(title, self.question.box, self.system.box, self._rows, self._scale, settings, below=(save,))
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
        self._rank = labelled(
            "rank", ipywidgets.Text(value="", placeholder="all"), 52, "Empty: the rank of the exact sum"
        )
        save = button("Save as adapter", "Save this blend as a new adapter", weakly(command, "save"))
        return settings_row(self._name, self._rank, save, margin="10px 0 0 0")

    # The values of the widgets

    @property
    def weights(self) -> dict[str, float]:
        """Adapter -> weight, without those at 0."""
        return {name: slider.weight for name, slider in self._sliders.items() if slider.weight}

    @property
    def type(self) -> str:
        """The combination type."""
        return str(self._type.value)

    @property
    def density(self) -> float:
        """The share of entries that TIES and DARE keep, in (0, 1]."""
        return float(self._density.value)

    @property
    def tokens(self) -> int:
        """The limit of an answer, in tokens."""
        return int(self._tokens.value)

    @property
    def name(self) -> str:
        """The name of the new adapter."""
        return str(self._name.value).strip()

    @property
    def rank(self) -> int | None:
        """The rank of the new adapter; None for the rank of the exact sum.

        Raises:
            NbpeftError: the field is not a whole number above 0.
        """
        text = str(self._rank.value).strip()
        if text in ("", "all"):
            return None
        if not text.isdecimal() or int(text) == 0:
            raise NbpeftError(f"The rank is {text!r}, expected a whole number, or an empty field for the exact sum.")
        return int(text)

    # What the widgets show

    def draw(self, model: ModelState | None, missing: str) -> None:
        """Shows a slider for each adapter; the sliders of adapters that are still there keep their weights."""
        names = [item.name for item in model.adapters] if model is not None else []
        self.system.draw(() if model is None else model.adapters)
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
