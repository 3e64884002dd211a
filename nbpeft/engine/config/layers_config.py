"""Base classes of configs with the fields of most methods: the layers to adapt, rank and alpha."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from nbpeft.engine.config.config_checks import (
    check_count,
    check_declared,
    check_number,
    check_target_fields,
    checked_pattern,
    unused_patterns,
)
from nbpeft.engine.config.module_paths import pattern_table
from nbpeft.engine.contract.adapter import AdapterConfig, PeftType


@dataclass
class LayersConfig(AdapterConfig):
    """Selects the layers to adapt.

    Attributes:
        target_modules: names of the layers to adapt, 'all-linear', or a pattern; None for the model type's defaults.
        exclude_modules: names of layers that are not adapted, or a pattern.
        layers_to_transform: indices of the transformer layers to adapt; None for all.
        layers_pattern: name of the module list that layers_to_transform indexes.
        modules_to_save: names of other modules that are copied, trained as a whole and saved.

    Raises:
        ConfigError: a value is invalid.
    """

    target_modules: Collection[str] | str | None = field(default=None)
    exclude_modules: Collection[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    checked_apart: ClassVar[tuple[str, ...]] = (
        *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"),
    )
    method_type: ClassVar[str] = ""
    """The ``peft_type``."""
    not_in_peft: ClassVar[tuple[str, ...]] = ()
    """Fields that PEFT's config of the method does not have; ``to_dict`` leaves them out if they are None."""
    pattern_fields: ClassVar[Mapping[str, Callable[..., None]]] = {}
    """Field that maps path patterns to values -> function that checks a value; see ``checked_pattern``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method_type)
        check_declared(self)
        for name, check in self.pattern_fields.items():
            setattr(self, name, checked_pattern(name, getattr(self, name), check))
        check_target_fields(self, pattern_fields=tuple(self.pattern_fields))

    def to_dict(self) -> dict[str, Any]:
        """All fields, without those of ``not_in_peft`` that are None."""
        fields = super().to_dict()
        return {name: value for name, value in fields.items() if name not in self.not_in_peft or value is not None}

    def unused_patterns(self, paths: Sequence[str]) -> str:
        """Describes keys of ``pattern_fields`` that match no adapted module."""
        return unused_patterns(self, tuple(self.pattern_fields), paths)


@dataclass
class HasFanInFanOut(LayersConfig):
    """Has a field of PEFT for the layout of weights.

    Attributes:
        fan_in_fan_out: whether layers store their weight as (in, out); set when the adapter is added.
    """

    fan_in_fan_out: bool = field(default=False)


@dataclass
class TrainsBiases(LayersConfig):
    """Can train biases of the model, too.

    Attributes:
        bias: which biases of the model are also trained.
    """

    bias: str = field(default="none")

    own_biases: ClassVar[str] = ""
    """The choice of the biases of adapted layers; by default the name of the method with "_only"."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.method_type:
            own = cls.own_biases or f"{cls.method_type.lower()}_only"
            cls.choices = {**cls.choices, "bias": ("none", "all", own)}


@dataclass
class RankedConfig(LayersConfig):
    """Adds a rank and an alpha, which patterns can override for some layers.

    Attributes:
        r: rank of the factors; determines the capacity and the size of the adapter.
        alpha: the delta is multiplied by alpha / r.
        rank_pattern: layer name or pattern -> r for these layers.
        alpha_pattern: layer name or pattern -> alpha for these layers.
    """

    r: int = field(default=8)
    alpha: float = field(default=8)
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)

    counts: ClassVar[tuple[str, ...]] = ("r",)
    pattern_fields: ClassVar[Mapping[str, Callable[..., None]]] = {
        "rank_pattern": check_count,
        "alpha_pattern": check_number,
    }
    value_fields: ClassVar[tuple[str, ...]] = ("alpha", "alpha_pattern")

    def rank_at(self, path: str) -> int:
        """The rank of the layer at a path, ``rank_pattern`` included."""
        return int(pattern_table(self, "rank_pattern").get(path, self.r))

    def alpha_at(self, path: str) -> float:
        """The alpha of the layer at a path as it was given, ``alpha_pattern`` included."""
        return pattern_table(self, "alpha_pattern").get(path, self.alpha)

    def scaling_at(self, path: str) -> float:
        """alpha / r of the layer at a path."""
        return self.alpha_at(path) / self.rank_at(path)


class LayerByLayer:
    """A config that can have settings for single layers, and custom classes for some layers."""

    def with_layer(self, path: str, layer_config: Any, *, target: bool) -> Any:
        """Creates a copy that has the settings of another config for one layer, so that they are saved.

        Args:
            path: path of the layer.
            layer_config: config of the method with the settings for this layer.
            target: whether to add the layer to the targets.

        Returns:
            The copy.

        Raises:
            ConfigError: the settings cannot be expressed in one config.
        """
        raise NotImplementedError

    def custom_layer_class(self, module: nn.Module) -> type[nn.Module] | None:
        """The custom class that is registered for a layer, or None; see ``injection.custom_layers``."""
        raise NotImplementedError

    def make_custom_layer(self, layer_class: type[nn.Module], module: nn.Module, path: str, name: str) -> nn.Module:
        """Creates the custom layer around a frozen one.

        Args:
            layer_class: class returned by ``custom_layer_class``.
            module: the frozen layer.
            path: path of the layer.
            name: name of the adapter.

        Returns:
            The custom layer, with one adapter.
        """
        raise NotImplementedError
