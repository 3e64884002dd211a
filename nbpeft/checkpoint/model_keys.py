"""Converts keys of a whole model's state dict, which contain the adapter's name, to keys of an adapter's file.

nbpeft base_model.model.<path>.adapters.<name>.core        base_model.model.<path>.modules_to_save.<name>.weight
PEFT   base_model.model.<path>.core.<name>.weight          (the same)
file   base_model.model.<path>.core.weight                 base_model.model.<path>.weight
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.registry import file_keys, prefixes

_Value = TypeVar("_Value")
_ADAPTERS = "adapters"
_COPIES = "modules_to_save"


def keys_of_a_file(tensors: Mapping[str, _Value], name: str, peft_type: str) -> dict[str, _Value]:
    """Returns the tensors with the keys of an adapter's file; keys without the adapter's name are unchanged.

    Args:
        tensors: key -> tensor or another value.
        name: the adapter's name.
        peft_type: the ``peft_type`` of its config.
    """
    return {_file_key(key, name, peft_type) or key: tensor for key, tensor in tensors.items()}


def is_of_a_model(tensors: Mapping[str, Tensor], name: str, peft_type: str) -> bool:
    """Returns whether a key contains the adapter's name, as in a whole model's state dict.

    Args:
        tensors: key -> tensor.
        name: the adapter's name.
        peft_type: the ``peft_type`` of its config.
    """
    return any(_file_key(key, name, peft_type) is not None for key in tensors)


def _file_key(key: str, name: str, peft_type: str) -> str | None:
    """Returns the key in an adapter's file, or None for a key that does not contain the adapter's name."""
    if f".{name}" not in key:
        return None
    names_in_file = file_keys(peft_type)
    parts = key.removeprefix("_orig_mod.").split(".")
    for position in range(1, len(parts)):
        before, here, behind = parts[position - 1], parts[position], parts[position + 1 :]
        if here != name:
            continue
        if before in (_ADAPTERS, ModelAdapter.peft.shown_as) and behind:
            parameter = ".".join(behind)
            place = parts[: position - 1] if before == _ADAPTERS else []  # a prompt belongs to no module
            return ".".join([*place, names_in_file.get(parameter, parameter)])
        if before == _COPIES and behind:
            return ".".join([*parts[: position - 1], *behind])
        if before.startswith(prefixes(peft_type)) and len(behind) < 2:
            # PEFT stores some parameters as the weight of a module; in files some of them have no ``.weight`` anyway.
            if not behind and f"{before}.{name}" in names_in_file.values():
                continue  # a parameter with the same name as the adapter
            inside, saved_as = ".".join([before, *behind]), names_in_file.get(before, before)
            if behind and (inside in names_in_file.values() or saved_as != before):
                return ".".join([*parts[: position - 1], inside])
            return ".".join([*parts[: position - 1], saved_as])
    return None
