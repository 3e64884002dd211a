"""What the records of the LoRA family's methods have in common: file keys, defaults, display and combining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.method_records import FileFormat, Listing
from nbpeft.engine.methods.lora.combining import combine_low_rank
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.conversion import as_plain_lora
from nbpeft.engine.methods.lora.fused import fuse

_LEAST_RANK = 4
"""A smaller adapter saves hardly any memory."""


def _summary(config: LoraConfig) -> Mapping[str, str]:
    """The rank and alpha; a star marks a value that a pattern overrides on some layers."""
    return {
        "r": f"{config.r}{'*' if config.rank_pattern else ''}",
        "α": f"{config.lora_alpha:g}{'*' if config.alpha_pattern else ''}",
    }


def _smaller(config: LoraConfig) -> LoraConfig | None:
    """A config with a quarter of the rank, if all layers have the same rank."""
    if config.adapter_size is None or config.adapter_size <= _LEAST_RANK:
        return None
    return config.resized(max(config.adapter_size // 4, _LEAST_RANK))


def listing(**fields: Any) -> Listing:
    """How lists and panels present a method of the family.

    Args:
        **fields: attributes of ``Listing``, without those that the methods have in common.
    """
    return Listing(summary=_summary, smaller=_smaller, **fields)


FILES = FileFormat(
    keys={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"},
    fuse=fuse,
    without_weight=as_plain_lora,
)
FAMILY: dict[str, Any] = {
    "peft_type": "LORA",
    "default_targets": usual_targets,
    "combine": combine_low_rank,
    "files": FILES,
}
