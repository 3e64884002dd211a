"""Settings of the inits LoftQ, EVA, CorDA and LoRA-GA. Fields and defaults are PEFT 0.21's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from nbpeft.engine.config.config_checks import Settings
from nbpeft.errors import ConfigError, ConfigTypeError, did_you_mean, shown

CORDA_METHODS = ("ipm", "kpm")
GRADIENT_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
GRADIENT_SCALES = ("stable", "weight_svd", "gd_scale", "unit")
LOFTQ_BITS = (2, 4, 8)


@dataclass
class LoftQConfig(Settings):
    """Settings of ``init_lora_weights="loftq"``.

    Attributes:
        loftq_bits: bits of the base weight: 4 (nf4, blocks of 64), 8 (int8, by row), or 2 (normal float, blocks of 64),
            which PEFT does not have.
        loftq_iter: number of alternations between quantizing the weight and decomposing its error.
    """

    loftq_bits: int = field(default=4)
    loftq_iter: int = field(default=1)

    counts: ClassVar[tuple[str, ...]] = ("loftq_iter",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"loftq_bits": LOFTQ_BITS}


@dataclass
class EvaConfig(Settings):
    """Settings of ``init_lora_weights="eva"`` (Paischer et al. 2024, arXiv:2410.07170).

    Attributes:
        rho: a layer gets at most ``rho * r`` ranks; with 1 every layer gets r.
        tau: a direction has converged if its cosine similarity before and after a batch is at least this.
        use_label_mask: ignore tokens whose label is ``label_mask_value``.
        label_mask_value: label of ignored tokens.
        whiten: divide each direction by the square root of its singular value.
        adjust_scaling_factors: keep ``lora_alpha / r`` of each layer when its rank changes.
    """

    rho: float = field(default=2.0)
    tau: float = field(default=0.99)
    use_label_mask: bool = field(default=True)
    label_mask_value: int = field(default=-100)
    whiten: bool = field(default=False)
    adjust_scaling_factors: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho >= 1.0:
            raise ConfigError(f"`rho` must be >= 1.0, not {shown(self.rho)}", field="rho")
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError(f"`tau` must be between 0.0 and 1.0. It is {shown(self.tau)}", field="tau")


@dataclass
class CordaConfig(Settings):
    """Settings of ``init_lora_weights="corda"`` (Yang et al. 2024, arXiv:2406.05223).

    Attributes:
        cache_file: file for the decompositions; if it exists, nothing is computed.
        covariance_file: file for the covariances of the layers' inputs, which are valid for any rank and method.
        corda_method: ``ipm`` trains the directions that are most important on the data, ``kpm`` those that are least
            important, which preserves the model's knowledge.
        verbose: show a progress bar.
        use_float16_for_covariance: accumulate the covariances in the dtype of the inputs, not in float32.
        prune_temporary_fields: delete ``covariance_matrix`` and ``sample_count`` from the layers at the end.
    """

    cache_file: str | None = field(default=None)
    covariance_file: str | None = field(default=None)
    corda_method: Literal["ipm", "kpm"] = field(default="ipm")
    verbose: bool = field(default=False)
    use_float16_for_covariance: bool = field(default=False)
    prune_temporary_fields: bool = field(default=True)

    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"corda_method": CORDA_METHODS}


@dataclass
class LoraGAConfig(Settings):
    """Settings of ``init_lora_weights="lora_ga"`` (Wang et al. 2024, arXiv:2407.05000).

    Attributes:
        direction: which of the 2r largest singular directions of the gradient go to A and which to B: ``ArB2r`` the
            first r to A, ``A2rBr`` the first r to B, ``ArBr`` alternately, ``random`` the same random r to both.
        scale: factor on B: ``stable`` by the output features and ``stable_gamma``, ``weight_svd`` by the weight's
            largest singular value, ``gd_scale`` by the adapter's scaling, ``unit`` none.
        stable_gamma: larger values give smaller initial factors.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = field(default="ArB2r")
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = field(default="stable")
    stable_gamma: int = field(default=16)

    counts: ClassVar[tuple[str, ...]] = ("stable_gamma",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"direction": GRADIENT_DIRECTIONS, "scale": GRADIENT_SCALES}


INIT_CONFIGS: dict[str, tuple[str, type[Any]]] = {
    "loftq": ("loftq_config", LoftQConfig),
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
}
"""Value of ``init_lora_weights`` -> the field of its settings, and their class."""


def no_settings() -> dict[str, Any]:
    """The fields with settings of inits, all set to their empty value."""
    return {field: {} if init == "loftq" else None for init, (field, _) in INIT_CONFIGS.items()}


def as_settings(name: str, value: Any, settings_class: type[Any]) -> Any:
    """Converts a field's value to its settings class; files contain it as a dictionary.

    Args:
        name: the field.
        value: an instance of the class, a dictionary of its fields, or None.
        settings_class: the class.

    Raises:
        ConfigTypeError: it is of another type.
        ConfigError: a field is unknown or invalid.
    """
    if value is None or isinstance(value, settings_class):
        return value
    if type(value).__name__ == settings_class.__name__:  # PEFT's own class
        value = vars(value)
    if not isinstance(value, Mapping):
        raise ConfigTypeError(
            f"{name} must be a {settings_class.__name__} or a dictionary, not {shown(value)}", field=name
        )
    known = [field.name for field in dataclasses.fields(settings_class)]
    unknown = [key for key in value if key not in known]
    if unknown:
        hint = did_you_mean(str(unknown[0]), known)
        raise ConfigError(f"{name} has no field {shown(unknown[0])}; it has {', '.join(known)}.{hint}", field=name)
    return settings_class(**value)
