"""Keys of a whole model's state dict, in which adapters stand by name, as keys of an adapter's file.

here   base_model.model.<path>.adapters.<name>.lora_A      base_model.model.<path>.modules_to_save.<name>.weight
PEFT   base_model.model.<path>.lora_A.<name>.weight        the same
file   base_model.model.<path>.lora_A.weight               base_model.model.<path>.weight
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nbpeft.checkpoint.spelling import spelling_of
from nbpeft.engine.factored import MAGNITUDE

_ADAPTERS = "adapters"
_COPIES = "modules_to_save"
_WHOLE = ("lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta", "trainable_tokens_original")
"""Parameters behind which PEFT writes the name last; it keeps the others in a module, as its ``weight``."""


def file_keys(tensors: Mapping[str, Tensor], name: str, peft_type: str = "LORA") -> dict[str, Tensor]:
    """The tensors under a file's keys, where the keys name the adapter; the others as they are.

    Args:
        tensors: key -> tensor.
        name: the adapter's name.
        peft_type: of its config.
    """
    return {_file_key(key, name, spelling_of(peft_type)) or key: tensor for key, tensor in tensors.items()}


def is_of_a_model(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether keys name the adapter, as those of a whole model's state dict do."""
    return any(_file_key(key, name, {}) is not None for key in tensors)


def _file_key(key: str, name: str, spelling: Mapping[str, str]) -> str | None:
    """None for a key that does not name the adapter."""
    parts = key.removeprefix("_orig_mod.").split(".")
    for position in range(1, len(parts) - 1):
        before, here, behind = parts[position - 1], parts[position], parts[position + 1 :]
        if here != name:
            continue
        if before == _ADAPTERS:
            parameter = ".".join(behind)
            return ".".join([*parts[: position - 1], spelling.get(parameter, parameter)])
        if before == _COPIES:
            return ".".join([*parts[: position - 1], *behind])
        if before == MAGNITUDE:
            return ".".join(parts[:position])
        if before.startswith("lora_") and len(behind) == 1:
            return ".".join([*parts[:position], *behind])
    if len(parts) > 2 and parts[-1] == name and parts[-2] in _WHOLE:
        return ".".join(parts[:-1])
    return None
