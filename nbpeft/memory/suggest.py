"""What to change so that it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nbpeft.errors import NbpeftError
from nbpeft.memory.optimizers import kind_of
from nbpeft.memory.simulate import Setting
from nbpeft.memory.surface import has_rank, surface_of
from nbpeft.memory.words import size_text

_WORTH_SAYING = 0.01
"""Suggestions that save less than this share of the peak are left out."""
_LENGTHS = 64
"""Lengths are suggested in steps of this."""


class Foreseen(Protocol):
    """What is read of a forecast."""

    @property
    def setting(self) -> Setting:
        """What it is for."""

    @property
    def optimizer(self) -> str:
        """Name of the optimizer."""

    @property
    def device_bytes(self) -> int | None:
        """What the device has."""

    @property
    def peak_bytes(self) -> int:
        """Most bytes needed."""

    @property
    def fits(self) -> bool | None:
        """Whether the device has that much."""

    @property
    def solve(self) -> Callable[[Setting, str, int | None], Any]:
        """Gives the forecast of another setting; None where it cannot tell yet."""


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

    @property
    def words(self) -> str:
        """What it saves and costs, without whether it fits."""
        cost = f" and {self.cost}" if self.cost else ""
        return f"{self.change} saves {size_text(self.saved_bytes)}{cost}"

    def __str__(self) -> str:
        return f"{self.words}; then it fits" if self.fits else self.words


@dataclass(frozen=True)
class Change:
    """One change of a setting.

    Attributes:
        words: what to change.
        cost: what it costs, in words.
        fields: fields of the setting and their new values; ``optimizer`` among them.
    """

    words: str
    cost: str
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """What is changed."""
        return next(iter(self.fields))


def suggest(forecast: Foreseen) -> tuple[Suggestion, ...]:
    """Changes that lower the peak, each alone, those that make it fit first; where none does, several together."""
    found = [_as_suggestion(forecast, [change]) for change in _changes(forecast)]
    worth = [one for one in found if one is not None and one.saved_bytes > _WORTH_SAYING * forecast.peak_bytes]
    worth.sort(key=lambda one: (not one.fits, -one.saved_bytes))
    if forecast.fits is False and not any(one.fits for one in worth):
        together = _together(forecast)
        worth = ([together] if together is not None else []) + worth
    return tuple(worth)


def _as_suggestion(forecast: Foreseen, changes: list[Change]) -> Suggestion | None:
    fields = {name: value for change in changes for name, value in change.fields.items()}
    optimizer = fields.pop("optimizer", forecast.optimizer)
    try:
        then = forecast.solve(forecast.setting.with_changes(**fields), optimizer, forecast.device_bytes)
    except NbpeftError:  # the model does not run like that
        then = None
    if then is None:
        return None
    cost = changes[0].cost if len(changes) == 1 else ""
    words = ", ".join(change.words for change in changes)
    return Suggestion(words, forecast.peak_bytes - then.peak_bytes, then.peak_bytes, cost, then.fits)


def _changes(forecast: Foreseen) -> Iterator[Change]:
    setting = forecast.setting
    yield from _switches(setting, forecast.optimizer)
    fits = _fitting(forecast)
    if setting.batch_size > 1:
        size = setting.batch_size
        yield _batch(setting, _most(1, size // 2, size, 1, lambda n: fits(batch_size=n)))
    if setting.sequence_length > _LENGTHS:
        top = setting.sequence_length
        yield _length(setting, _most(_LENGTHS, top // 2, top, _LENGTHS, lambda n: fits(sequence_length=n)))
    yield from _rank(setting)


def _switches(setting: Setting, optimizer: str) -> Iterator[Change]:
    """What is on or off, or stored in another way."""
    if setting.training and not setting.gradient_checkpointing and setting.architecture.checkpoints:
        yield Change("gradient_checkpointing=True", "costs about a third more time", {"gradient_checkpointing": True})
    if setting.dtype == torch.float32:
        yield Change("dtype float32 -> bfloat16", "rounds weights", {"dtype": torch.bfloat16})
    for kind in ("nf4", "int8"):
        if setting.quantization is None and (setting.adapter_config is not None or not setting.training):
            yield Change(f"quantization={kind!r}", "rounds weights", {"quantization": kind})
    if setting.quantization == "int8":
        yield Change("quantization int8 -> nf4", "rounds weights more", {"quantization": "nf4"})
    if setting.training and kind_of(optimizer)[0] == "adamw":
        yield Change(f"optimizer {optimizer} -> adamw_8bit", "needs bitsandbytes", {"optimizer": "adamw_8bit"})


def _batch(setting: Setting, less: int) -> Change:
    cost = ""
    if setting.training:
        times = -(-setting.batch_size // less)
        cost = f"keeps its effect with gradient_accumulation_steps times {times}"
    return Change(f"batch_size {setting.batch_size} -> {less}", cost, {"batch_size": less})


def _length(setting: Setting, less: int) -> Change:
    words = f"sequence_length {setting.sequence_length} -> {less}"
    return Change(words, "cuts longer texts", {"sequence_length": less})


def _rank(setting: Setting) -> Iterator[Change]:
    """A quarter of the rank, where there is more than 4 of it."""
    rank = getattr(setting.adapter_config, "r", None)
    if setting.adapter_config is not None and has_rank(setting) and isinstance(rank, int) and rank > 4:
        less = max(rank // 4, 4)
        changed = setting.adapter_config.copy(r=less)
        yield Change(f"r {rank} -> {less}", "learns less detail", {"adapter_config": changed})


def _fitting(forecast: Foreseen) -> Callable[..., bool]:
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


def _together(forecast: Foreseen) -> Suggestion | None:
    """Changes one after the other, what costs least first, until it fits; None where it never does.

    What turns out not to be needed is left out again.
    """
    made: dict[str, Change] = {}
    for change in _ladder(forecast.setting, forecast.optimizer):
        made[change.name] = change
        found = _as_suggestion(forecast, list(made.values()))
        if found is None:
            return None
        if found.fits:
            break
    else:
        return None
    for name in [name for name in made if len(made) > 1]:
        fewer = [change for other, change in made.items() if other != name]
        without = _as_suggestion(forecast, fewer) if fewer else None
        if without is not None and without.fits:
            del made[name]
            found = without
    if surface_of(forecast.setting) is not None:
        found = _eased(forecast, made) or found
    return found


def _eased(forecast: Foreseen, made: dict[str, Change]) -> Suggestion | None:
    """The same changes with the rows as many and as long as still fit; halving went too far."""
    setting = forecast.setting
    ways: tuple[tuple[str, int, Callable[[Setting, int], Change]], ...] = (
        ("sequence_length", _LENGTHS, _length),
        ("batch_size", 1, _batch),
    )
    for name, step, build in ways:
        if name not in made:
            continue

        def fits(value: int, name: str = name, build: Callable[[Setting, int], Change] = build) -> bool:
            tried = _as_suggestion(forecast, list({**made, name: build(setting, value)}.values()))
            return tried is not None and tried.fits is True

        reached = made[name].fields[name]
        made[name] = build(setting, _most(reached, reached, getattr(setting, name), step, fits))
    return _as_suggestion(forecast, list(made.values()))


def _ladder(setting: Setting, optimizer: str) -> Iterator[Change]:
    """Changes in the order of what they cost; a later one of the same name goes further."""
    switches = {change.name: change for change in reversed(list(_switches(setting, optimizer)))}
    for name in ("gradient_checkpointing", "dtype"):
        if name in switches:
            yield switches[name]
    batch, length = setting.batch_size, setting.sequence_length
    while batch > 1:
        batch //= 2
        yield _batch(setting, batch)
    for name in ("quantization", "optimizer"):
        if name in switches:
            yield switches[name]
    yield from _rank(setting)
    while length > _LENGTHS:
        length = max(length // 2, _LENGTHS)
        yield _length(setting, length)
