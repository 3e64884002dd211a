"""Keys of a whole model's state dict, in which adapters stand by name, as keys of an adapter's file.

here   base_model.model.<path>.adapters.<name>.core        base_model.model.<path>.modules_to_save.<name>.weight
PEFT   base_model.model.<path>.core.<name>.weight          the same
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
    """The tensors under a file's keys, where the keys name the adapter; the others as they are.

    Args:
        tensors: key -> tensor, or what else it stands for.
        name: the adapter's name.
        peft_type: of its config.
    """
    return {_file_key(key, name, peft_type) or key: tensor for key, tensor in tensors.items()}


def is_of_a_model(tensors: Mapping[str, Tensor], name: str, peft_type: str) -> bool:
    """Whether keys name the adapter, as those of a whole model's state dict do."""
    return any(_file_key(key, name, peft_type) is not None for key in tensors)


def _file_key(key: str, name: str, peft_type: str) -> str | None:
    """None for a key that does not name the adapter."""
    spelling = file_keys(peft_type)
    parts = key.removeprefix("_orig_mod.").split(".")
    for position in range(1, len(parts)):
        before, here, behind = parts[position - 1], parts[position], parts[position + 1 :]
        if here != name:
            continue
        if before in (_ADAPTERS, ModelAdapter.peft.shown_as) and behind:
            parameter = ".".join(behind)
            place = parts[: position - 1] if before == _ADAPTERS else []  # a prompt has none
            return ".".join([*place, spelling.get(parameter, parameter)])
        if before == _COPIES and behind:
            return ".".join([*parts[: position - 1], *behind])
        if before.startswith(prefixes(peft_type)) and len(behind) < 2:
            # PEFT keeps some parameters in a module, as its weight; in files some of those are bare all the same.
            if not behind and f"{before}.{name}" in spelling.values():
                continue  # the name is that of the parameter, too
            inside, spelt = ".".join([before, *behind]), spelling.get(before, before)
            if behind and (inside in spelling.values() or spelt != before):
                return ".".join([*parts[: position - 1], inside])
            return ".".join([*parts[: position - 1], spelt])
    return None
