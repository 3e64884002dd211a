"""Widgets of the memory plan: a slider or a drop-down for each setting, and the plan below."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ipywidgets

from nbpeft._util.device_names import DEVICES, THIS_MACHINE
from nbpeft.display.blocks import dim, line
from nbpeft.display.html import span, to_html
from nbpeft.names import DTYPES, OPTIMIZERS, QUANTIZATIONS
from nbpeft.session.results.planning import PlanResult, PlanSettings
from nbpeft.widgets.aria import SLIDER
from nbpeft.widgets.controls import Command, Frame, html, labelled, settings_row
from nbpeft.widgets.lifetime import close_tree, weakly

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_QUANTIZATIONS = (("none", ""), *((name, name) for name in QUANTIZATIONS))


class LogSlider:
    """A slider over numbers on a roughly logarithmic scale.

    Args:
        label: The name of the setting.
        values: The numbers.
        value: The initial number; added to the others if it is not among them.
        command: Called with ``moved``.
    """

    def __init__(self, label: str, values: Iterable[int], value: int, command: Command) -> None:
        self._slider = ipywidgets.SelectionSlider(
            options=[(f"{number:,}", number) for number in sorted({*values, value})],
            value=value,
            layout=ipywidgets.Layout(flex="1 1 auto", width="auto", margin="0"),
        )
        self._slider.observe(weakly(command, "moved"), names="value")
        name = html(span(dim(label)))
        name.add_class("nbpeft-label")
        self.box = ipywidgets.HBox([name, self._slider], layout=ipywidgets.Layout(width="100%", align_items="center"))
        self.box.add_class(SLIDER)

    @property
    def value(self) -> int:
        """The number the slider is set to."""
        return int(self._slider.value)


class PlanControls:
    """The widgets of the panel."""

    def __init__(self, command: Command, title: str, settings: PlanSettings, device: str) -> None:
        self._training = settings.training
        self._batch = LogSlider("batch", BATCHES, settings.batch_size, command)
        self._length = LogSlider("sequence length", LENGTHS, settings.max_length, command)
        self._rank = None if settings.rank is None else LogSlider("rank", RANKS, settings.rank, command)
        self._dtype = _choice("dtype", [(name, name) for name in DTYPES], settings.dtype, 104, command)
        self._kind = _choice("quantization", _QUANTIZATIONS, settings.quantization or "", 84, command)
        self._optimizer = _choice("optimizer", [(name, name) for name in OPTIMIZERS], settings.optim, 136, command)
        self._again = ipywidgets.Checkbox(
            value=settings.gradient_checkpointing,
            description="gradient checkpointing",
            indent=False,
            layout=ipywidgets.Layout(width="180px", margin="0"),
        )
        self._again.observe(weakly(command, "moved"), names="value")
        this_machine = [("this machine", THIS_MACHINE)]
        model_device = [] if device in DEVICES or "this machine" in device else [(device, "")]
        chosen = device if device in DEVICES else "" if model_device else THIS_MACHINE
        devices = [*this_machine, *model_device, *((name, name) for name in DEVICES)]
        self._device = _choice("device", devices, chosen, 140, command)
        choices = [self._device, self._dtype, self._kind]
        if settings.training:
            choices += [self._optimizer, self._again]
        box = settings_row(*choices, margin="6px 0 4px 0")
        sliders = [slider.box for slider in (self._batch, self._length, self._rank) if slider is not None]
        self._unused = [] if settings.training else [self._optimizer, self._again]
        self.frame = Frame(title, *sliders, box)
        self.root, self.message = self.frame.root, self.frame.message

    @property
    def settings(self) -> PlanSettings:
        """The settings chosen with the widgets."""
        return PlanSettings(
            self._batch.value,
            self._length.value,
            None if self._rank is None else self._rank.value,
            str(self._dtype.value),
            str(self._kind.value) or None,
            bool(self._again.value),
            str(self._optimizer.value),
            self._training,
            str(self._device.value),
        )

    def show(self, result: PlanResult, *, current: bool) -> None:
        """Shows a plan.

        Args:
            result: The plan.
            current: Whether it belongs to the settings shown; otherwise it is drawn faintly.
        """
        self.frame.head(result.aside if current else "computing …", running=not current)
        notes = tuple(line(dim(note)) for note in result.notes)
        faint = "" if current else "opacity:.45"
        self.frame.answers.value = f'<div style="{faint}">{to_html((*result.blocks(), *notes))}</div>'

    def free(self) -> None:
        """Closes the widgets that are not part of the panel and would otherwise stay open."""
        for widget in self._unused:
            close_tree(widget)


def _choice(label: str, options: Iterable[tuple[str, str]], value: str, width: int, command: Command) -> Any:
    pairs = list(options)
    if value not in [key for _, key in pairs]:
        pairs.append((value, value))
    dropdown = labelled(label, ipywidgets.Dropdown(options=pairs, value=value), width)
    dropdown.observe(weakly(command, "moved"), names="value")
    return dropdown
