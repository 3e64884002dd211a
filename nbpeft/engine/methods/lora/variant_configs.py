"""Settings of variants of LoRA. Fields and defaults are PEFT 0.21's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nbpeft.engine.config_checks import check_count, check_number
from nbpeft.engine.field_types import check_types
from nbpeft.errors import ConfigError, few


@dataclass
class BdLoraConfig:
    """Settings of BD-LoRA (arXiv:2510.23346), whose factors can be split among devices without talk between them.

    Of a layer that is split by its inputs (out_proj, down_proj) A is block-diagonal, of one that is split by its
    outputs (q_proj, k_proj, v_proj, up_proj, gate_proj) B.

    Attributes:
        target_modules_bd_a: parts of the paths of layers whose A is block-diagonal.
        target_modules_bd_b: parts of the paths of layers whose B is.
        nblocks: how many blocks: over how many devices the model will be split when it is served.
        match_strict: refuse a layer that neither names; False gives it plain factors.

    Raises:
        ConfigError: a value is impossible, or both name the same.
    """

    target_modules_bd_a: list[str] | None = field(default=None)
    target_modules_bd_b: list[str] | None = field(default=None)
    nblocks: int = field(default=1)
    match_strict: bool = field(default=True)

    def __post_init__(self) -> None:
        check_types(self)
        check_count("nblocks", self.nblocks)
        both = sorted(set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()))
        if both:
            raise ConfigError(
                f"target_modules_bd_a and target_modules_bd_b both name {few(both)}: only one factor of a layer can be "
                "block-diagonal",
                field="use_bdlora",
            )

    def blocks_at(self, path: str) -> tuple[int, int]:
        """How many blocks A and B have on a layer.

        Raises:
            ConfigError: both are to be block-diagonal there; or neither, which ``match_strict`` does not allow.
        """
        in_A, in_B = (
            any(part in path for part in parts or ()) for parts in (self.target_modules_bd_a, self.target_modules_bd_b)
        )
        if in_A and in_B:
            raise ConfigError(
                f"{path}: target_modules_bd_a and target_modules_bd_b both name it: only one factor can be "
                "block-diagonal",
                field="use_bdlora",
                path=path,
            )
        if self.match_strict and not in_A and not in_B:
            raise ConfigError(
                f"{path}: neither target_modules_bd_a nor target_modules_bd_b names it; match_strict=False gives such "
                "layers plain factors",
                field="use_bdlora",
                path=path,
            )
        return self.nblocks if in_A else 1, self.nblocks if in_B else 1


@dataclass
class KasaConfig:
    """Settings of KaSA (Wang et al. 2024, arXiv:2412.06071): weights of what its training adds to the loss.

    Attributes:
        beta: of the squares of the singular values that are learned.
        gamma: of the distances of A and B from orthogonal ones.

    Raises:
        ConfigError: one is negative.
    """

    beta: float = field(default=1e-4)
    gamma: float = field(default=1e-3)

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("beta", "gamma"):
            check_number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, as {getattr(self, name)} is", field=name)


VARIANT_CONFIGS: dict[str, type[Any]] = {"kasa_config": KasaConfig, "use_bdlora": BdLoraConfig}
"""The field of a variant's settings -> their class."""


def no_variant() -> dict[str, Any]:
    """The fields that make what is added another product than that of the saved factors, so that it is that alone."""
    return {**dict.fromkeys(VARIANT_CONFIGS), "use_qalora": False}
