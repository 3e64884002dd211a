"""The arguments of a training that its run keeps, and those that a resumed one takes over from there.

What is given is kept as a plain value, or named as an object that has to be given again. What is kept is taken over
but for what acts outside of the training, since a folder of runs may come from somebody else: where something is
written, published or reported, and how many processes there are beyond what this machine has. That is named.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

_OUTSIDE = {
    *("output_dir", "logging_dir", "run_name", "report_to", "project", "trackio_space_id", "deepspeed"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "overwrite_output_dir"),
    *("data", "model", "tokenizer", "data_hint", "adapter", "control", "publish", "run_factory", "run_dir", "source"),
    *("trainer_class", "arguments_class", "resume_from_checkpoint", "background", "keep", "restart", "replaced"),
    *("ctx", "tracked", "run", "variable"),
}
"""Arguments that say where something goes, and those with which ``train`` is called anew."""
_HUB = ("hub_", "push_to_hub")
_COUNTS = ("processes", "dataloader_num_workers")
"""Arguments that start processes; a machine has as many as it has processors."""
_CHANGE_LOSSES = ("processes", "machines")
"""Of what is not taken over, what a resumed training cannot do without."""


def plain(value: Any) -> Any:
    """A value in types that JSON and Python's literals have; one that has no such form as it is."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_plain_value(value: Any) -> bool:
    """Whether JSON holds a value as it is."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain_value(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain_value, value))
    return value is None or isinstance(value, bool | int | float | str)


def to_keep(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments as plain values, and the names of those that have no such form.

    Args:
        given: arguments of a training.
    """
    values = {name: plain(value) for name, value in given.items()}
    kept = {name: value for name, value in values.items() if is_plain_value(value)}
    return kept, [name for name in values if name not in kept]


def to_take_over(kept: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a resumed training takes over of the arguments that a run has kept, and what it does not.

    Args:
        kept: as read from its folder.
    """
    found = {str(name): value for name, value in kept.items()} if isinstance(kept, Mapping) else {}
    taken = {name: value for name, value in found.items() if _stays_inside(name, value)}
    return taken, {name: value for name, value in found.items() if name not in taken}


def missing_for_losses(left_out: Mapping[str, Any]) -> list[str]:
    """Of what was not taken over, the names of what changes the losses."""
    return [name for name in _CHANGE_LOSSES if left_out.get(name) is not None]


def _stays_inside(name: str, value: Any) -> bool:
    if name in _OUTSIDE or name == "machines" or name.startswith(_HUB):
        return False
    if name == "eval_data":  # how many rows are held out
        return isinstance(value, int | float)
    return name not in _COUNTS or (isinstance(value, int) and value <= (os.cpu_count() or 1))
