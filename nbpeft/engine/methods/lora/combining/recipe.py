"""Settings of combining adapters: the type and its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nbpeft.engine.contract.combination import is_number
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.names import COMBINATION_TYPES

_PRUNING_RULES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")

SIGN_METHODS = ("total", "frequency")
SVD_DRIVERS = ("gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True)
class Recipe:
    """Settings of combining adapters, checked on creation.

    Args:
        combination_type: ``exact`` is the weighted sum of the deltas, without loss unless ``svd_rank``
            is given. ``svd`` is the same truncated to the largest rank of the adapters. ``cat`` stacks the
            factors. ``linear``, ``ties``, ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` are
            PEFT's formulas on A and B separately, which mix each adapter's A with the others' B and so
            differ from the weighted delta. Names ending in ``_svd`` work on the full deltas.
        svd_rank: rank of the result, for ``exact`` and the types ending in ``svd``.
        svd_clamp: quantile in (0, 1] at which the entries of the result are clamped.
        svd_full_matrices: as in PEFT; affects only results that are clamped.
        svd_driver: cuSOLVER's method, on CUDA only.
        density: fraction of the entries that survive pruning, in [0, 1].
        majority_sign_method: ``total`` weights signs by magnitude, ``frequency`` counts them.

    Raises:
        ConfigError: a value is unknown, missing or out of range.
    """

    combination_type: str = "exact"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        name = self.combination_type
        _check_choice("combination_type", name, COMBINATION_TYPES)
        _check_choice("majority_sign_method", self.majority_sign_method, SIGN_METHODS)
        if self.svd_driver is not None:
            _check_choice("svd_driver", self.svd_driver, SVD_DRIVERS)
        if self.svd_rank is not None and (type(self.svd_rank) is not int or self.svd_rank < 1):
            raise ConfigError(f"svd_rank must be a positive integer, not {self.svd_rank!r}", svd_rank=self.svd_rank)
        if self.svd_clamp is not None and not (is_number(self.svd_clamp) and 0 < self.svd_clamp <= 1):
            raise ConfigError(f"svd_clamp is a quantile in (0, 1], not {self.svd_clamp!r}", svd_clamp=self.svd_clamp)
        if self.prunes:
            _check_density(name, self.density, random=self.draws)

    @property
    def prunes(self) -> bool:
        """Whether entries are dropped, so that ``density`` is needed."""
        return self.rule in _PRUNING_RULES

    @property
    def draws(self) -> bool:
        """Whether entries are dropped at random."""
        return self.rule.startswith("dare")

    @property
    def on_factors(self) -> bool:
        """Whether the rule applies to A and B separately, so that ranks must be equal."""
        return self.combination_type not in ("exact", "cat", "svd") and not self.on_deltas

    @property
    def on_deltas(self) -> bool:
        """Whether the rule applies to the full deltas, elementwise."""
        return self.combination_type.endswith("_svd")

    @property
    def rule(self) -> str:
        """The type's elementwise rule: its name without ``_svd``."""
        return self.combination_type.removesuffix("_svd")

    def for_count(self, count: int) -> Recipe:
        """This recipe for a number of adapters; PEFT combines a single adapter as ``linear``."""
        if count != 1 or self.combination_type == "exact":
            return self
        return Recipe("linear")


def settings_for(combination_type: str) -> tuple[str, ...]:
    """Which of ``svd_rank``, ``svd_clamp`` and ``density`` affect a combination type."""
    ranked = ("svd_rank", "svd_clamp") if combination_type == "exact" or combination_type.endswith("svd") else ()
    pruned = ("density",) if combination_type.removesuffix("_svd") in _PRUNING_RULES else ()
    return (*ranked, *pruned)


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{field} {value!r} is unknown; choose from {', '.join(choices)}." + did_you_mean(str(value), choices),
            **{field: value},
        )


def _check_density(name: str, density: float | None, *, random: bool) -> None:
    if density is None:
        raise ConfigError(
            f"combination_type {name!r} needs density: the share of entries to keep, e.g. density=0.5",
            combination_type=name,
            missing="density",
        )
    if not is_number(density) or not density >= 0 or (random and density == 0):
        bound = "> 0" if random else ">= 0"
        raise ConfigError(f"density must be {bound} for {name!r}, not {density!r}", density=density)
