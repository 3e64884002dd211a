"""What optimizers keep for each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from nbpeft.errors import ConfigError, did_you_mean

_SMALL = 4096
"""Parameters with fewer elements keep 32-bit state also in 8-bit optimizers (bitsandbytes' default)."""
_BLOCK = 256


def _states(count: int) -> Callable[[tuple[int, ...], int], int]:
    def size(shape: tuple[int, ...], item: int) -> int:
        return count * math.prod(shape) * item

    return size


def _with_step(count: int) -> Callable[[tuple[int, ...], int], int]:
    def size(shape: tuple[int, ...], item: int) -> int:
        return count * math.prod(shape) * item + 4

    return size


def _eight_bit(count: int) -> Callable[[tuple[int, ...], int], int]:
    def size(shape: tuple[int, ...], item: int) -> int:
        elements = math.prod(shape)
        return count * (4 * elements if elements < _SMALL else elements + 4 * -(-elements // _BLOCK))

    return size


def _factored(shape: tuple[int, ...], item: int) -> int:
    if len(shape) < 2:
        return math.prod(shape) * 4
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


_KINDS: dict[str, Callable[[tuple[int, ...], int], int]] = {
    "adamw": _with_step(2),
    "adam": _with_step(2),
    "adamw_8bit": _eight_bit(2),
    "sgd": _states(0),
    "sgd_momentum": _states(1),
    "rmsprop": _with_step(1),
    "adagrad": _with_step(1),
    "adafactor": _factored,
    "lion": _states(1),
    "lion_8bit": _eight_bit(1),
}
_ALIASES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "lion_32bit": "lion",
}
OPTIMIZERS = tuple(_KINDS)


def kind_of(optimizer: str) -> tuple[str, bool]:
    """The optimizer's kind, and whether its state is paged (lives on the host when the device is full).

    Accepts the names of ``TrainingArguments.optim`` too.

    Raises:
        ConfigError: the name is not known.
    """
    name = optimizer.lower() if isinstance(optimizer, str) else repr(optimizer)
    paged = name.startswith("paged_")
    name = name.removeprefix("paged_").removesuffix("_32bit") if paged else name
    name = _ALIASES.get(name, name)
    if name not in _KINDS:
        raise ConfigError(
            f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZERS)}." + did_you_mean(name, OPTIMIZERS),
            optimizer=optimizer,
        )
    return name, paged


def state_bytes(optimizer: str, parameters: Iterable[tuple[tuple[int, ...], int]]) -> int:
    """Bytes of an optimizer's state.

    Args:
        optimizer: its name.
        parameters: (shape, bytes an element) of each trained parameter.
    """
    size = _KINDS[kind_of(optimizer)[0]]
    return sum(size(shape, item) for shape, item in parameters)
