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
    action_button,
    field_layout,
    html,
    one_each,
    pair,
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
LABEL = 130


class Slider:
    """The weight of one adapter.

    Args:
        name: The adapter.
        value: To begin with.
        command: Called with ``moved``.
    """

    def __init__(self, name: str, value: float, command: Command) -> None:
        self._label = html(
            span(Text(name, tooltip=name, wrap="cut")),
            flex=f"0 0 {LABEL}px",
            width=f"{LABEL}px",
        )
        self._slider = ipywidgets.FloatSlider(
            value=min(max(value, LOW), HIGH),
            min=LOW,
            max=HIGH,
            step=STEP,
            readout_format=".2f",
            layout=ipywidgets.Layout(flex="1 1 auto", width="auto", margin="0"),
        )
        self._slider.observe(weakly(command, "moved"), names="value")
        self.box = ipywidgets.HBox(
            [self._label, self._slider], layout=ipywidgets.Layout(width="100%", align_items="center")
        )

    @property
    def weight(self) -> float:
        """Where it stands."""
        return round(float(self._slider.value), 4)


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
        self.form = PromptForm(command, chat)
        self._settings = self._make_settings(command, tokens)
        self._save = self._make_save(command)
        self.frame = Frame(title, self.question.box, self._rows, self._settings)
        children = list(self.frame.root.children)
        self.frame.root.children = (*children[:-1], self._save, children[-1])
        self.root, self.message = self.frame.root, self.frame.message

    def _make_settings(self, command: Command, tokens: int) -> Any:
        self._type = ipywidgets.Dropdown(options=TYPES, value="exact", layout=field_layout("170px"))
        self._type.observe(weakly(self._type_chosen), names="value")
        self._density = ipywidgets.BoundedFloatText(
            value=0.5, min=0.05, max=1.0, step=0.05, layout=field_layout("66px")
        )
        self._density.observe(weakly(command, "moved"), names="value")
        self._tokens = tokens_field(tokens)
        self._density_pair = pair("density", self._density)
        self._density_pair.layout.display = "none"
        box = ipywidgets.HBox(
            [
                pair("combination type", self._type),
                self._density_pair,
                pair("max new tokens", self._tokens),
                self.form.box,
            ],
            layout=ipywidgets.Layout(width="100%", margin="6px 0 0 0"),
        )
        box.add_class("nbpeft-settings")
        return box

    def _make_save(self, command: Command) -> Any:
        self._name = ipywidgets.Text(value="blend", placeholder="name", layout=field_layout("150px"))
        self._rank = ipywidgets.Text(value="", placeholder="all", layout=field_layout("52px"))
        self._rank_pair = pair("rank", self._rank)
        button = action_button("Save as adapter", "Make an adapter of this blend", "124px", weakly(command, "save"))
        box = ipywidgets.HBox(
            [pair("name", self._name), self._rank_pair, button],
            layout=ipywidgets.Layout(width="100%", margin="10px 0 0 0"),
        )
        box.add_class("nbpeft-settings")
        return box

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
        self._density_pair.layout.display = "none" if exact else None
        self._rank_pair.layout.display = None if exact else "none"
        self._command("moved")
