"""Suggests changes of a setting that lower its peak memory."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nbpeft.engine.contract.registry import method_of
from nbpeft.errors import NbpeftError
from nbpeft.memory.estimate import Setting, estimate
from nbpeft.memory.formatting import size_text
from nbpeft.memory.optimizers import kind_of
from nbpeft.names import LOSS_CHUNK_SIZE

_LEAST_SHARE = 0.01
"""Suggestions that save less than this share of the peak are left out."""
_LENGTH_STEP = 64
"""Sequence lengths are suggested in multiples of this."""


@dataclass(frozen=True)
class Suggestion:
    """One change, or several together, and its effect on the peak.

    Attributes:
        change: what to change, e.g. ``batch_size 8 -> 4``.
        saved_bytes: by how many bytes the peak decreases.
        peak_bytes: the peak after the change, in bytes.
        cost: its disadvantage, in words; may be empty.
        fits: whether the peak fits the device after the change; None without a device.
    """

    change: str
    saved_bytes: int
    peak_bytes: int
    cost: str = ""
    fits: bool | None = None

    @property
    def words(self) -> str:
        """The change with what it saves and costs, without whether it fits."""
        cost = f" and {self.cost}" if self.cost else ""
        return f"{self.change} saves {size_text(self.saved_bytes)}{cost}"

    def __str__(self) -> str:
        return f"{self.words}; then it fits" if self.fits else self.words


@dataclass(frozen=True)
class _Change:
    """One field of a setting with another value, and the fields that change with it."""

    field: str
    value: Any
    text: str
    cost: str
    with_it: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        return self.with_it | {self.field: self.value}


def suggest(
    setting: Setting, device_bytes: int | None, stopped: Callable[[], bool] = lambda: False
) -> tuple[Suggestion, ...]:
    """Return single changes that lower the peak, those that make it fit first.

    If no single change makes it fit, a combination of several comes first, if there is one.

    Args:
        setting: the setting to improve.
        device_bytes: memory of the device in bytes, or None.
        stopped: called before each estimate, which takes up to a second. If it returns True, the suggestions found so
            far are returned.
    """
    return _Search(setting, device_bytes, stopped).run()


class _Search:
    """Searches for changes of one setting."""

    def __init__(self, setting: Setting, limit: int | None, stopped: Callable[[], bool]) -> None:
        self._setting = setting
        self._limit = limit
        self._stopped = stopped
        self._peak = _peak_bytes(setting)
        self._wanted = limit is not None and self._peak > limit

    def run(self) -> tuple[Suggestion, ...]:
        suggestions = [
            suggestion
            for change in self._single_changes()
            if (suggestion := self._suggestion([change])) is not None
            and suggestion.saved_bytes > _LEAST_SHARE * self._peak
        ]
        suggestions.sort(key=lambda suggestion: (not suggestion.fits, -suggestion.saved_bytes))
        if self._wanted and not any(suggestion.fits for suggestion in suggestions):
            together = self._together()
            suggestions = ([together] if together is not None else []) + suggestions
        return tuple(suggestions)

    def _peak_with(self, changes: Sequence[_Change]) -> int | None:
        """Return the peak with changes in bytes; None if the model does not run with them, or after a stop."""
        if self._stopped():
            return None
        fields = {name: value for change in changes for name, value in change.fields.items()}
        try:
            return _peak_bytes(dataclasses.replace(self._setting, **fields))
        except NbpeftError:
            return None

    def _fits(self, changes: Sequence[_Change]) -> bool:
        peak = self._peak_with(changes)
        return peak is not None and self._limit is not None and peak <= self._limit

    def _suggestion(self, changes: Sequence[_Change]) -> Suggestion | None:
        peak = self._peak_with(changes)
        if peak is None:
            return None
        cost = changes[0].cost if len(changes) == 1 else ""
        fits = None if self._limit is None else peak <= self._limit
        return Suggestion(", ".join(change.text for change in changes), self._peak - peak, peak, cost, fits)

    def _single_changes(self) -> Iterator[_Change]:
        setting = self._setting
        yield from _switches(setting)
        if (size := setting.batch_size) > 1:
            yield self._largest(_batch, size, 1) or _batch(setting, size // 2)
        if (length := setting.max_length) > _LENGTH_STEP:
            yield self._largest(_length, length, _LENGTH_STEP) or _length(setting, length // 2)
        yield from _smaller_adapter(setting)

    def _largest(
        self,
        change_to: Callable[[Setting, int], _Change],
        above: int,
        step: int,
        *,
        least: int | None = None,
        others: Sequence[_Change] = (),
    ) -> _Change | None:
        """Return the change to the largest multiple of a step below a value that does not fit, together with others.

        None if the setting fits already, or if not even the smallest value (by default the step) fits.
        """

        def peak(value: int) -> int | None:
            return self._peak_with([*others, change_to(self._setting, value)])

        if not self._wanted or self._limit is None:
            return None
        low, high = (least or step) // step, -(-above // step)  # low fits, high does not
        below, beyond = peak(low * step), peak(above)
        if below is None or beyond is None or below > self._limit:
            return None
        tries = 0
        while high - low > 1:
            # The peak is almost linear in the value, so interpolation mostly finds it at once. Every third try bisects,
            # which bounds the number of tries.
            guess = low + int((self._limit - below) / max(beyond - below, 1) * (high - low))
            guess = (low + high) // 2 if tries % 3 == 2 else min(max(guess, low + 1), high - 1)
            found = peak(guess * step)
            if found is None:
                return None
            if found <= self._limit:
                low, below = guess, found
            else:
                high, beyond = guess, found
            tries += 1
        return change_to(self._setting, low * step)

    def _together(self) -> Suggestion | None:
        """Return several changes that fit together, preferring cheap ones; None if even all of them do not fit.

        Changes that turn out to be unnecessary are dropped, and batch and sequences are not reduced more than needed.
        """
        ladder = list(_ladder(self._setting))

        def first(count: int) -> dict[str, _Change]:
            return {change.field: change for change in ladder[:count]}

        count = bisect.bisect_left(range(1, len(ladder) + 1), True, key=lambda n: self._fits([*first(n).values()])) + 1
        if count > len(ladder):
            return None
        changes = first(count)
        for field in list(changes):
            fewer = [change for other, change in changes.items() if other != field]
            if fewer and self._fits(fewer):
                del changes[field]
        ways = (("max_length", _length, _LENGTH_STEP), ("batch_size", _batch, 1))
        for field, change_to, step in ways:
            if field in changes:
                others = [change for other, change in changes.items() if other != field]
                least, original = changes[field].value, getattr(self._setting, field)
                changes[field] = self._largest(change_to, original, step, least=least, others=others) or changes[field]
        return self._suggestion(list(changes.values()))


def _peak_bytes(setting: Setting) -> int:
    return sum(part.byte_count for part in estimate(setting))


def _switches(setting: Setting) -> Iterator[_Change]:
    """Yield changes of options and storage formats, as opposed to sizes."""
    if setting.training and not setting.gradient_checkpointing and setting.architecture.checkpoints:
        text = "gradient_checkpointing=True"
        yield _Change("gradient_checkpointing", True, text, "costs about a third more time")
    if setting.training and not setting.loss_chunk_size:
        yield _Change("loss_chunk_size", LOSS_CHUNK_SIZE, f"loss_chunk_size={LOSS_CHUNK_SIZE}", "")
    if setting.dtype == torch.float32:
        half = torch.bfloat16 if setting.bfloat16 else torch.float16
        yield _Change("dtype", half, f"dtype float32 -> {str(half).removeprefix('torch.')}", "rounds weights")
    for kind, text in (("nf4", "bits=4"), ("int8", "bits=8")):
        if setting.quantization is None and (setting.adapter_config is not None or not setting.training):
            # Preparing a quantized model for training switches gradient checkpointing on.
            prepared = {"gradient_checkpointing": True} if setting.training and setting.architecture.checkpoints else {}
            yield _Change("quantization", kind, text, "rounds weights", prepared)
    if setting.quantization == "int8":
        yield _Change("quantization", "nf4", "bits 8 -> 4", "rounds weights more")
    if setting.training and kind_of(setting.optim)[0] == "adamw":
        text = f"optim {setting.optim} -> adamw_8bit"
        yield _Change("optim", "adamw_8bit", text, "needs bitsandbytes")


def _batch(setting: Setting, size: int) -> _Change:
    cost = ""
    if setting.generation:  # several steps of gradient accumulation then hold the same groups of completions
        size = next(smaller for smaller in range(size, 0, -1) if setting.batch_size % smaller == 0)
    if setting.training:
        times = -(-setting.batch_size // size)
        cost = f"is equivalent with gradient_accumulation_steps times {times}"
    return _Change("batch_size", size, f"batch_size {setting.batch_size} -> {size}", cost)


def _length(setting: Setting, length: int) -> _Change:
    text = f"max_length {setting.max_length} -> {length}"
    return _Change("max_length", length, text, "truncates longer texts")


def _smaller_adapter(setting: Setting) -> Iterator[_Change]:
    config = setting.adapter_config
    less = None if config is None else method_of(config).listing.smaller(config)
    if config is not None and less is not None:
        now = config.to_dict()
        text = ", ".join(f"{name} {now[name]} -> {new}" for name, new in less.to_dict().items() if new != now[name])
        yield _Change("adapter_config", less, text, "has less capacity")


def _ladder(setting: Setting) -> Iterator[_Change]:
    """Yield changes by increasing cost; a later change of the same field goes further."""
    switches = {change.field: change for change in reversed(list(_switches(setting)))}
    for field in ("gradient_checkpointing", "dtype"):
        if field in switches:
            yield switches[field]
    batch, length = setting.batch_size, setting.max_length
    while batch > 1:
        batch //= 2
        yield _batch(setting, batch)
    for field in ("quantization", "optim"):
        if field in switches:
            yield switches[field]
    yield from _smaller_adapter(setting)
    while length > _LENGTH_STEP:
        length = max(length // 2, _LENGTH_STEP)
        yield _length(setting, length)
