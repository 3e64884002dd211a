"""Settings of variants of LoRA. Fields and defaults are PEFT 0.21's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from nbpeft.engine.config.config_checks import check_count, check_number
from nbpeft.engine.contract.field_types import check_types
from nbpeft.engine.methods.lora.init_configs import check_choice
from nbpeft.errors import ConfigError, few

DIRECTIONS = ("batch_average", "batch_average_once", "random")
_GENERAL = re.compile(r"gks_\d+")
"""Names that ``create_arrow_model`` gives to general adapters."""


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        check_number(name, getattr(config, name))
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be above 0, not {getattr(config, name)}", field=name)


@dataclass
class ArrowConfig:
    """Settings of Arrow (Ostapenko et al. 2024, arXiv:2405.11157) and GenKnowSub (2025.acl-short.54).

    Attributes:
        top_k: to how many adapters each token goes; to all where there are fewer.
        router_temperature: the scores of those adapters are divided by it before the softmax.
        use_gks: subtract the mean of the general adapters' factors from those of each adapter (GenKnowSub). The
            adapters themselves stay as they are.
        task_adapter_names: the adapters that tokens go to; None for all LoRA adapters beside, those to come included.
        gks_adapter_names: the general adapters; None for those called gks_0, gks_1, …
        rng_seed: accepted for PEFT's sake: nothing is drawn.

    Raises:
        ConfigError: a value is impossible.
    """

    top_k: int = field(default=3)
    router_temperature: float = field(default=1.0)
    use_gks: bool = field(default=False)
    task_adapter_names: list[str] | None = field(default=None, kw_only=True)
    gks_adapter_names: list[str] | None = field(default=None, kw_only=True)
    rng_seed: int | None = field(default=None)

    def __post_init__(self) -> None:
        check_types(self)
        check_count("top_k", self.top_k)
        _check_positive(self, "router_temperature")

    def general_among(self, names: Iterable[str]) -> list[str]:
        """Names of the general adapters, of which only those among ``names`` where the settings name none."""
        return self.gks_adapter_names or [name for name in names if _GENERAL.fullmatch(name)]


@dataclass
class VeloraConfig:
    """Settings of VeLoRA (Miles et al. 2024, arXiv:2405.17991).

    Attributes:
        num_groups: into how many pieces an input is cut, of each of which one number is kept: more keep more.
        scale: factor on the input that is put together from them.
        init_type: the direction that the numbers are lengths along: ``batch_average`` the mean piece of each batch,
            ``batch_average_once`` that of the first one, or ``random``.

    Raises:
        ConfigError: a value is impossible.
    """

    num_groups: int = field(default=64)
    scale: float = field(default=1.0)
    init_type: Literal["batch_average", "batch_average_once", "random"] = field(default="batch_average")

    def __post_init__(self) -> None:
        check_types(self)
        check_count("num_groups", self.num_groups)
        _check_positive(self, "scale")
        check_choice(self, "init_type", DIRECTIONS)


@dataclass
class MontecloraConfig:
    """Settings of MonteCLoRA (Sengupta et al. 2024, arXiv:2411.04358).

    Attributes:
        num_samples: how many perturbations of A are drawn in each call, and averaged.
        use_entropy: add the sum of the squared weights of that average to the loss, which keeps them even.
        dirichlet_prior: concentration of the prior of those weights.
        sample_scaler: factor on the perturbations.
        kl_loss_weight: weight of the divergence from the priors in the loss.
        buffer_size: accepted for PEFT's sake: nothing is drawn ahead.

    Raises:
        ConfigError: a value is impossible.
    """

    num_samples: int = field(default=8)
    use_entropy: bool = field(default=False)
    dirichlet_prior: float = field(default=0.1)
    sample_scaler: float = field(default=1e-4)
    kl_loss_weight: float = field(default=1e-5)
    buffer_size: int = field(default=150)

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("num_samples", "buffer_size"):
            check_count(name, getattr(self, name))
        for name in ("sample_scaler", "kl_loss_weight"):
            check_number(name, getattr(self, name))
        _check_positive(self, "dirichlet_prior")


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


VARIANT_CONFIGS: dict[str, type[Any]] = {
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
    "monteclora_config": MontecloraConfig,
    "use_bdlora": BdLoraConfig,
    "velora_config": VeloraConfig,
}
"""The field of a variant's settings -> their class."""


def no_variant() -> dict[str, Any]:
    """The fields that make what is added another product than that of the saved factors, so that it is that alone."""
    return {**dict.fromkeys(VARIANT_CONFIGS), "use_qalora": False}
