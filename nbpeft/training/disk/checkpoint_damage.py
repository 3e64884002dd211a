"""Checks that the small files of a checkpoint can be resumed from, before a Trainer reads them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbpeft.checkpoint.tensor_file import unpickled
from nbpeft.errors import shortened

STATE = "trainer_state.json"
_KINDS: Mapping[str, Any] = {"log_history": [], "stateful_callbacks": {}}
"""Field whose default is None -> a value of the type it has during training."""
_COUNTS = ("global_step", "max_steps")
_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
_SHOWN = 40


def state_damage(file: Path) -> str | None:
    """What a Trainer cannot read in ``trainer_state.json``; None if it can read all of it.

    Args:
        file: the existing file.

    Raises:
        OSError: the file cannot be read.
    """
    from transformers import TrainerState

    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return f"{STATE} is not valid JSON"
    if not isinstance(state, dict):
        return f"{STATE} contains a {type(state).__name__}, not an object"
    defaults = {item.name: _KINDS.get(item.name, item.default) for item in dataclasses.fields(TrainerState)}
    for name, value in state.items():
        if name not in defaults:
            return f"{STATE} has a field {shortened(name, _SHOWN)!r} that this version of transformers does not know"
        if not _is_like(name, value, defaults[name]):
            return f"{STATE}: {name} is {value!r:.{_SHOWN}}"
    return None


def _is_like(name: str, value: Any, default: Any) -> bool:
    if name in _COUNTS:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if isinstance(default, bool | list | dict):
        return isinstance(value, type(default))
    if isinstance(default, int | float):
        return value is None or (isinstance(value, int | float) and math.isfinite(value))
    return True


def archive_damage(file: Path) -> str | None:
    """The damage of a file with the random state or the loss scale, with the remedy.

    Args:
        file: the existing file.

    Returns:
        None for a sound file, and for other files, which are not checked.
    """
    from transformers.trainer import safe_globals  # type: ignore[attr-defined]  # where 5.0 defines it

    kinds: Mapping[str, tuple[Callable[[Any], object], str]] = {
        "rng_state": (_set_random, "delete it to resume with a new random state"),
        "scaler": (_set_scale, "delete it to resume with the initial loss scale"),
    }
    check, remedy = next((kind for name, kind in kinds.items() if file.name.startswith(name)), (None, ""))
    if check is None:
        return None
    try:
        with safe_globals():
            check(unpickled(file))
    except Exception:  # torch, pickle, numpy and random each have their own errors
        return f"{file.name} is damaged: {remedy}"
    return None


def _set_random(state: Any) -> None:
    """Sets new generators to a state, to check that they accept it."""
    random.Random().setstate(state["python"])
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["cpu"])


def _set_scale(state: Any) -> None:
    if not all(0 <= state[name] < math.inf for name in _SCALER) or not state["scale"]:
        raise ValueError("no loss scale")
