"""How a parameter of an adapter is called in PEFT's files.

A parameter is written as ``<module path>.<parameter name>`` unless the table says otherwise: in
PEFT some parameters belong to a small module and so carry ``.weight`` or ``.bias``. A method that
is not listed needs no entry as long as its parameters are plain.
"""

from __future__ import annotations

from collections.abc import Mapping

PREFIX = "base_model.model."
"""Starts every key of a file."""

BASE_LAYER = "base_layer"
"""The frozen layer inside an adapted one."""

ORIGINAL_MODULE = "original_module"
"""The frozen module beside a copy that is trained as a whole."""

_SPELLINGS: dict[str, dict[str, str]] = {
    "LORA": {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_B_bias": "lora_B.bias",
        "trainable_tokens_delta": "token_adapter.trainable_tokens_delta",
    },
    "OFT": {"oft_R": "oft_R.weight"},
    "LN_TUNING": {"ln_tuning_weight": "ln_tuning_layers.weight", "ln_tuning_bias": "ln_tuning_layers.bias"},
}


def add_spelling(peft_type: str, names: Mapping[str, str]) -> None:
    """Adds a method's parameter names and how files spell them.

    Args:
        peft_type: the ``peft_type`` of the method's config files.
        names: parameter name -> what follows the module path in a file.
    """
    _SPELLINGS.setdefault(peft_type, {}).update(names)


def spelling_of(peft_type: str) -> Mapping[str, str]:
    """Parameter name -> what follows the module path; a name that is not in it stays as it is."""
    return _SPELLINGS.get(peft_type, {})
