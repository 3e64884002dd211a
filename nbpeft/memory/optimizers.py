"""The size of optimizer states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from nbpeft.errors import ConfigError, did_you_mean

_SMALL = 4096
"""Parameters with fewer elements have 32-bit state in 8-bit optimizers too (bitsandbytes' default)."""
_BLOCK = 256

StateBytes = Callable[[tuple[int, ...], int], int]
"""(shape, bytes per element) of a parameter -> bytes of its state."""


def _states(count: int, step: int = 0) -> StateBytes:
    """Return the size of ``count`` tensors like the parameter and a step counter of ``step`` bytes."""
    return lambda shape, item: count * math.prod(shape) * item + step


def _eight_bit(count: int) -> StateBytes:
    """Return the size of ``count`` tensors with one byte per element and a scale per block."""

    def size(shape: tuple[int, ...], item: int) -> int:
        elements = math.prod(shape)
        return count * (4 * elements if elements < _SMALL else elements + 4 * -(-elements // _BLOCK))

    return size


def _factored(shape: tuple[int, ...], item: int) -> int:
    """Return the size of Adafactor's row and column means."""
    if len(shape) < 2:
        return math.prod(shape) * 4
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


_STATE_BYTES: dict[str, StateBytes] = {
    "adamw": _states(2, step=4),
    "adam": _states(2, step=4),
    "adamw_8bit": _eight_bit(2),
    "sgd": _states(0),
    "sgd_momentum": _states(1),
    "rmsprop": _states(1, step=4),
    "adagrad": _states(1, step=4),
    "adafactor": _factored,
    "lion": _states(1),
    "lion_8bit": _eight_bit(1),
    "ademamix": _states(3, step=4),
    "ademamix_8bit": _eight_bit(3),
    "rmsprop_8bit": _eight_bit(1),
    "grokadamw": _states(3, step=4),
    "schedule_free_sgd": _states(1),
    "lomo": _states(0),
}
_ALIASES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "lion_32bit": "lion",
    **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "stable_adamw"), "adamw"),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), "adamw"),
    # At most: 4 bits take half of 8, and GaLore and Apollo keep the states of projected gradients.
    **dict.fromkeys(("adamw_torch_8bit", "adamw_torch_4bit", "galore_adamw_8bit"), "adamw_8bit"),
    **dict.fromkeys(("galore_adamw", "apollo_adamw"), "adamw"),
    "galore_adafactor": "adafactor",
    "adalomo": "adafactor",
    "rmsprop_bnb": "rmsprop",
    "rmsprop_bnb_32bit": "rmsprop",
    "rmsprop_bnb_8bit": "rmsprop_8bit",
}


def kind_of(optimizer: str) -> tuple[str, bool]:
    """Return the optimizer's kind, and whether its state is paged (moves to host memory when the device is full).

    Accepts the values of ``TrainingArguments.optim`` too.

    Raises:
        ConfigError: the name is unknown.
    """
    name = optimizer.lower() if isinstance(optimizer, str) else repr(optimizer)
    paged = name.startswith("paged_")
    name = name.removeprefix("paged_").removesuffix("_32bit") if paged else name
    name = name.removesuffix("_layerwise")
    name = _ALIASES.get(name, name)
    if name not in _STATE_BYTES:
        raise ConfigError(
            f"optimizer {optimizer!r} is not one of {', '.join(_STATE_BYTES)}." + did_you_mean(name, _STATE_BYTES),
            optimizer=optimizer,
        )
    return name, paged


def state_bytes(optimizer: str, parameters: Iterable[tuple[tuple[int, ...], int]]) -> int:
    """Return the size of an optimizer's state in bytes.

    Args:
        optimizer: name of the optimizer.
        parameters: (shape, bytes per element) of each trained parameter.
    """
    size = _STATE_BYTES[kind_of(optimizer)[0]]
    return sum(size(shape, item) for shape, item in parameters)
