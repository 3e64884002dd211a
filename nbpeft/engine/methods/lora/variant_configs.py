"""Settings of variants of LoRA. Fields and defaults are PEFT 0.21's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from nbpeft.engine.config.config_checks import Settings
from nbpeft.errors import ConfigError, few

DIRECTIONS = ("batch_average", "batch_average_once", "random")
_GENERAL = re.compile(r"gks_\d+")
"""Names that ``create_arrow_model`` gives to general adapters."""


@dataclass
class ArrowConfig(Settings):
    """Settings of Arrow (Ostapenko et al. 2024, arXiv:2405.11157) and GenKnowSub (2025.acl-short.54).

    Attributes:
        top_k: number of adapters that each token is routed to; all if there are fewer.
        router_temperature: the scores of those adapters are divided by it before the softmax.
        use_gks: subtract the mean of the general adapters' factors from those of each adapter (GenKnowSub). The
            adapters themselves are not changed.
        task_adapter_names: the adapters that tokens are routed to; None for all other LoRA adapters, those added later
            included.
        gks_adapter_names: the general adapters; None for those named gks_0, gks_1, …
        rng_seed: ignored, accepted as in PEFT: no random numbers are used.
    """

    top_k: int = field(default=3)
    router_temperature: float = field(default=1.0)
    use_gks: bool = field(default=False)
    task_adapter_names: list[str] | None = field(default=None, kw_only=True)
    gks_adapter_names: list[str] | None = field(default=None, kw_only=True)
    rng_seed: int | None = field(default=None)

    counts: ClassVar[tuple[str, ...]] = ("top_k",)
    positive: ClassVar[tuple[str, ...]] = ("router_temperature",)

    def general_among(self, names: Iterable[str]) -> list[str]:
        """Names of the general adapters: those of the settings, else those among ``names`` that are named gks_N."""
        return self.gks_adapter_names or [name for name in names if _GENERAL.fullmatch(name)]


@dataclass
class VeloraConfig(Settings):
    """Settings of VeLoRA (Miles et al. 2024, arXiv:2405.17991).

    Attributes:
        num_groups: number of groups that an input is split into; one number per group is saved for backward.
        scale: factor on the input that is reconstructed from them.
        init_type: the direction onto which groups are projected: ``batch_average`` the mean group of each batch,
            ``batch_average_once`` that of the first batch, or ``random``.
    """

    num_groups: int = field(default=64)
    scale: float = field(default=1.0)
    init_type: Literal["batch_average", "batch_average_once", "random"] = field(default="batch_average")

    counts: ClassVar[tuple[str, ...]] = ("num_groups",)
    positive: ClassVar[tuple[str, ...]] = ("scale",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"init_type": DIRECTIONS}


@dataclass
class MontecloraConfig(Settings):
    """Settings of MonteCLoRA (Sengupta et al. 2024, arXiv:2411.04358).

    Attributes:
        num_samples: number of perturbations of A that are drawn in each call and averaged.
        use_entropy: add the sum of the squared weights of that average to the loss, which keeps the weights even.
        dirichlet_prior: concentration of the prior of those weights.
        sample_scaler: factor on the perturbations.
        kl_loss_weight: weight of the KL divergence from the priors in the loss.
        buffer_size: ignored, accepted as in PEFT: nothing is drawn in advance.
    """

    num_samples: int = field(default=8)
    use_entropy: bool = field(default=False)
    dirichlet_prior: float = field(default=0.1)
    sample_scaler: float = field(default=1e-4)
    kl_loss_weight: float = field(default=1e-5)
    buffer_size: int = field(default=150)

    counts: ClassVar[tuple[str, ...]] = ("num_samples", "buffer_size")
    positive: ClassVar[tuple[str, ...]] = ("dirichlet_prior",)


@dataclass
class BdLoraConfig(Settings):
    """Settings of BD-LoRA (arXiv:2510.23346), whose factors can be sharded without additional communication.

    On a layer that is sharded by its inputs (out_proj, down_proj) A is block-diagonal; on a layer that is sharded by
    its outputs (q_proj, k_proj, v_proj, up_proj, gate_proj) B is.

    Attributes:
        target_modules_bd_a: parts of the paths of layers whose A is block-diagonal.
        target_modules_bd_b: parts of the paths of layers whose B is.
        nblocks: number of blocks: the number of devices among which the model is sharded for serving.
        match_strict: refuse a layer that neither list matches; False gives it plain factors.

    Raises:
        ConfigError: a value is invalid, or both lists contain the same name.
    """

    target_modules_bd_a: list[str] | None = field(default=None)
    target_modules_bd_b: list[str] | None = field(default=None)
    nblocks: int = field(default=1)
    match_strict: bool = field(default=True)

    counts: ClassVar[tuple[str, ...]] = ("nblocks",)

    def __post_init__(self) -> None:
        super().__post_init__()
        both = sorted(set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()))
        if both:
            raise ConfigError(
                f"target_modules_bd_a and target_modules_bd_b both name {few(both)}: only one factor of a layer can be "
                "block-diagonal",
                field="use_bdlora",
            )

    def blocks_at(self, path: str) -> tuple[int, int]:
        """Numbers of blocks of A and of B on a layer; 1 for a plain factor.

        Raises:
            ConfigError: both would be block-diagonal; or neither, which ``match_strict`` does not allow.
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
class KasaConfig(Settings):
    """Settings of KaSA (Wang et al. 2024, arXiv:2412.06071): weights of its terms in the training loss.

    Attributes:
        beta: weight of the squares of the learned singular values.
        gamma: weight of the distances of A and B from orthogonality.
    """

    beta: float = field(default=1e-4)
    gamma: float = field(default=1e-3)

    not_negative: ClassVar[tuple[str, ...]] = ("beta", "gamma")


VARIANT_CONFIGS: dict[str, type[Any]] = {
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
    "monteclora_config": MontecloraConfig,
    "use_bdlora": BdLoraConfig,
    "velora_config": VeloraConfig,
}
"""Field of a variant's settings -> the settings' class."""


def no_variant() -> dict[str, Any]:
    """Values of the fields of variants that turn all of them off, so that the delta is the product of the factors."""
    return {**dict.fromkeys(VARIANT_CONFIGS), "use_qalora": False}
