"""Base of the methods that train n numbers of a layer, whose positions are drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.random_numbers import drawn_places
from nbpeft.engine.config.config_checks import check_count, check_linear
from nbpeft.engine.config.layers_config import HasFanInFanOut, TrainsBiases
from nbpeft.engine.config.module_paths import pattern_table
from nbpeft.engine.contract.adapter import Rescales
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.weight_delta import WeightDelta
from nbpeft.errors import ConfigError


@dataclass
class PlacedConfig(HasFanInFanOut, TrainsBiases):
    """How many numbers of each layer are trained, and where.

    Attributes:
        n_frequency: number of trained numbers of a layer.
        scaling: factor on the delta.
        random_loc_seed: seed of their positions.
        n_frequency_pattern: layer name or pattern -> another n_frequency.
    """

    n_frequency: int = field(default=1000)
    scaling: float = field(default=1.0)
    random_loc_seed: int = field(default=777)
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)

    counts: ClassVar[tuple[str, ...]] = ("n_frequency",)
    seeds: ClassVar[tuple[str, ...]] = ("random_loc_seed",)
    pattern_fields: ClassVar[Mapping[str, Callable[..., None]]] = {"n_frequency_pattern": check_count}

    def frequencies_at(self, path: str) -> int:
        """The number of numbers at a module path."""
        return int(pattern_table(self, "n_frequency_pattern").get(path, self.n_frequency))


def fewer(config: Any) -> Any:
    """A config with half of the numbers; None at one."""
    return config.copy(n_frequency=config.n_frequency // 2) if config.n_frequency > 1 else None


class Placed(WeightDelta, Rescales):
    """The numbers of one layer, (n,), the only parameter.

    Attributes:
        seed: seed of their positions in the weight, or in the transform of it.
    """

    from_config: ClassVar[Mapping[str, str]] = {"scaling": "scaling", "seed": "random_loc_seed"}
    spectrum: ClassVar[str]
    """Name of the parameter."""

    seed: int

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The numbers, (n,)."""
        check_linear(cls.__name__, path, kind)
        count, (inputs, outputs) = config.frequencies_at(path), kind.features(module)
        if count > inputs * outputs:
            raise ConfigError(
                f"{path}: n_frequency = {count} is larger than its weight, {outputs} x {inputs}; lower it", path=path
            )
        return {cls.spectrum: (count,)}

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return int(self.tensors[0].shape[0])

    def places(self, base: BaseLayer) -> Tensor:
        """Their positions in the flattened weight, (n,)."""
        return drawn_places(base.out_features * base.in_features, self.count, self.seed).to(self.tensors[0].device)


def widest(dtype: torch.dtype) -> torch.dtype:
    """At least float32: there is no transform of half precision on a CPU."""
    return torch.promote_types(dtype, torch.float32)
