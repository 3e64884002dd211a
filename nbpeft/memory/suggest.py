"""What to change so that it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nbpeft.memory.optimizers import kind_of
from nbpeft.memory.simulate import Setting
from nbpeft.memory.surface import has_rank, surface_of
from nbpeft.memory.words import size_text

if TYPE_CHECKING:
    from nbpeft.memory.forecast import Forecast

_WORTH_SAYING = 0.01
"""Suggestions that save less than this share of the peak are left out."""
_LENGTHS = 64
"""Lengths are suggested in steps of this."""


@dataclass(frozen=True)
class Suggestion:
    """A change, or several together, and what it brings.

    Attributes:
        change: what to change, e.g. ``batch_size 8 -> 4``.
        saved_bytes: how much lower the peak gets.
        peak_bytes: the peak then.
        cost: what it costs, in words.
        fits: whether it fits the device then; None without a device.
    """

    change: str
    saved_bytes: int
    peak_bytes: int
    cost: str = ""
    fits: bool | None = None

    def __str__(self) -> str:
        cost = f" and {self.cost}" if self.cost else ""
        fit = {True: "; then it fits", False: "", None: ""}[self.fits]
        return f"{self.change} saves {size_text(self.saved_bytes)}{cost}{fit}"


@dataclass(frozen=True)
class Change:
    """One change of a setting."""

    words: str
    cost: str
    setting: Setting
    optimizer: str


def suggest(forecast: Forecast) -> tuple[Suggestion, ...]:
    """Changes that lower the peak, each alone, those that make it fit first; where none does, several together."""
    found = [_as_suggestion(forecast, [change]) for change in _changes(forecast)]
    worth = [one for one in found if one is not None and one.saved_bytes > _WORTH_SAYING * forecast.peak_bytes]
    worth.sort(key=lambda one: (not one.fits, -one.saved_bytes))
    if forecast.fits is False and not any(one.fits for one in worth):
        together = _together(forecast)
        worth = ([together] if together is not None else []) + worth
    return tuple(worth)


def _as_suggestion(forecast: Forecast, changes: list[Change]) -> Suggestion | None:
    last = changes[-1]
    then = forecast.solve(last.setting, last.optimizer, forecast.device_bytes)
    if then is None:
        return None
    cost = changes[0].cost if len(changes) == 1 else ""
    words = ", ".join(change.words for change in changes)
    return Suggestion(words, forecast.peak_bytes - then.peak_bytes, then.peak_bytes, cost, then.fits)


def _changes(forecast: Forecast) -> Iterator[Change]:
    setting, optimizer = forecast.setting, forecast.optimizer
    yield from _switches(setting, optimizer)
    fits = _fitting(forecast)
    if setting.batch_size > 1:
        less = _most(1, setting.batch_size // 2, setting.batch_size, 1, lambda n: fits(batch_size=n))
        yield _batch(setting, optimizer, less)
    if setting.sequence_length > _LENGTHS:
        half, top = setting.sequence_length // 2, setting.sequence_length
        less = _most(_LENGTHS, half, top, _LENGTHS, lambda n: fits(sequence_length=n))
        yield _length(setting, optimizer, less)
    rank = getattr(setting.adapter_config, "r", None)
    if setting.adapter_config is not None and has_rank(setting) and isinstance(rank, int) and rank > 4:
        less = max(rank // 4, 4)
        changed = setting.with_changes(adapter_config=setting.adapter_config.copy(r=less))
        yield Change(f"r {rank} -> {less}", "learns less detail", changed, optimizer)


def _switches(setting: Setting, optimizer: str) -> Iterator[Change]:
    """What is on or off, or stored in another way."""
    if setting.training and not setting.gradient_checkpointing:
        changed = setting.with_changes(gradient_checkpointing=True)
        yield Change("gradient_checkpointing=True", "costs about a third more time", changed, optimizer)
    if setting.dtype == torch.float32:
        changed = setting.with_changes(dtype=torch.bfloat16)
        yield Change("dtype float32 -> bfloat16", "rounds weights", changed, optimizer)
    for kind in ("nf4", "int8"):
        if setting.quantization is None and (setting.adapter_config is not None or not setting.training):
            changed = setting.with_changes(quantization=kind)
            yield Change(f"quantization={kind!r}", "rounds weights", changed, optimizer)
    if setting.quantization == "int8":
        changed = setting.with_changes(quantization="nf4")
        yield Change("quantization int8 -> nf4", "rounds weights more", changed, optimizer)
    if setting.training and kind_of(optimizer)[0] == "adamw":
        yield Change(f"optimizer {optimizer} -> adamw_8bit", "needs bitsandbytes", setting, "adamw_8bit")


def _batch(setting: Setting, optimizer: str, less: int) -> Change:
    cost = ""
    if setting.training:
        times = -(-setting.batch_size // less)
        cost = f"keeps its effect with gradient_accumulation_steps times {times}"
    words = f"batch_size {setting.batch_size} -> {less}"
    return Change(words, cost, setting.with_changes(batch_size=less), optimizer)


def _length(setting: Setting, optimizer: str, less: int) -> Change:
    words = f"sequence_length {setting.sequence_length} -> {less}"
    return Change(words, "cuts longer texts", setting.with_changes(sequence_length=less), optimizer)


def _fitting(forecast: Forecast) -> Callable[..., bool]:
    """Says whether a setting with changed fields fits; always no where nothing is wanted or asking takes long."""
    if forecast.fits is not False or surface_of(forecast.setting) is None:
        return lambda **changes: False

    def fits(**changes: int) -> bool:
        then = forecast.solve(forecast.setting.with_changes(**changes), forecast.optimizer, forecast.device_bytes)
        return then is not None and then.fits is True

    return fits


def _most(least: int, otherwise: int, top: int, step: int, fits: Callable[[int], bool]) -> int:
    """The largest value below ``top`` that fits, in steps; ``otherwise`` where not even the least does."""
    if not fits(least):
        return otherwise
    low, high = 1, -(-top // step)  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _together(forecast: Forecast) -> Suggestion | None:
    """Changes one after the other, what costs least first, until it fits; None where it never does."""
    setting, optimizer = forecast.setting, forecast.optimizer
    made: list[Change] = []
    while True:
        change = next(_next_changes(setting, optimizer), None)
        if change is None:
            return None
        made = [old for old in made if old.words.split(" ")[0] != change.words.split(" ")[0]] + [change]
        setting, optimizer = change.setting, change.optimizer
        found = _as_suggestion(forecast, made)
        if found is None or found.fits:
            return _renamed(found, forecast, setting)


def _next_changes(setting: Setting, optimizer: str) -> Iterator[Change]:
    for change in _switches(setting, optimizer):
        if change.words.startswith(("gradient_checkpointing", "dtype")):
            yield change
    if setting.batch_size > 1:
        yield _batch(setting, optimizer, setting.batch_size // 2)
    for change in _switches(setting, optimizer):
        if "nf4" in change.words or change.words.startswith("optimizer"):
            yield change
    if setting.sequence_length > _LENGTHS:
        yield _length(setting, optimizer, max(setting.sequence_length // 2, _LENGTHS))


def _renamed(found: Suggestion | None, forecast: Forecast, setting: Setting) -> Suggestion | None:
    """With the first and the last value of what was halved several times."""
    if found is None:
        return None
    words = []
    for change in found.change.split(", "):
        name = change.split(" ")[0]
        if name in ("batch_size", "sequence_length"):
            change = f"{name} {getattr(forecast.setting, name)} -> {getattr(setting, name)}"
        words.append(change)
    return Suggestion(", ".join(words), found.saved_bytes, found.peak_bytes, "", found.fits)
