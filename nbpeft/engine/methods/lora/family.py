"""What LoRA and DoRA share of the record of a method: config files, defaults, what people see, combining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbpeft.engine.methods.lora.combining import combine_low_rank
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.conversion import as_plain_lora
from nbpeft.engine.targets import usual_targets


def _summary(config: LoraConfig) -> Mapping[str, str]:
    return {
        "r": _span([config.r, *config.rank_pattern.values()]),
        "α": _span([config.lora_alpha, *config.alpha_pattern.values()]),
    }


def _span(values: list[Any]) -> str:
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g}–{most:g}"


def _smaller(config: LoraConfig) -> LoraConfig | None:
    """The same at half the rank and the same scaling."""
    ranks = [config.r, *config.rank_pattern.values()]
    if max(ranks) < 2:
        return None
    halved = {pattern: max(1, rank // 2) for pattern, rank in config.rank_pattern.items()}
    return config.copy(r=max(1, config.r // 2), rank_pattern=halved)


FAMILY: dict[str, Any] = {
    "peft_type": "LORA",
    "file_keys": {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"},
    "default_targets": usual_targets,
    "summary": _summary,
    "smaller": _smaller,
    "combine": combine_low_rank,
    "without_weight": as_plain_lora,
}
