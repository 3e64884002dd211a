"""Fields that the configs of most methods have: which layers they adapt, with which rank and strength."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from nbpeft.engine.config.config_checks import (
    check_count,
    check_number,
    check_share,
    check_target_fields,
    checked_pattern,
    unused_patterns,
)
from nbpeft.engine.config.module_paths import pattern_table
from nbpeft.engine.contract.adapter import AdapterConfig, PeftType
from nbpeft.errors import BiasError, ConfigError, did_you_mean, shown


@dataclass
class LayersConfig(AdapterConfig):
    """Which layers are adapted.

    Attributes:
        target_modules: names of the layers to adapt, 'all-linear', or a pattern; None for the model type's usual ones.
        exclude_modules: names of layers to leave as they are, or a pattern.
        layers_to_transform: numbers of the layers to adapt; None for all.
        layers_pattern: name of the list of layers that layers_to_transform counts in.
        modules_to_save: names of other modules that are copied, trained as a whole and saved.

    Raises:
        ConfigError: a value is impossible.
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
    counts: ClassVar[tuple[str, ...]] = ()
    """Fields that hold a rank or another size."""
    shares: ClassVar[tuple[str, ...]] = ()
    """Fields that hold a dropout or another share, from 0 to 1."""
    not_in_peft: ClassVar[tuple[str, ...]] = ()
    """Fields that PEFT's config of the method lacks."""
    pattern_fields: ClassVar[Mapping[str, Callable[..., None]]] = {}
    """Fields that map patterns over paths to values -> what checks a value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method_type)
        check_filled(self)
        for name in self.counts:
            check_count(name, getattr(self, name))
        for name in self.shares:
            check_share(name, getattr(self, name))
        for name, check in self.pattern_fields.items():
            setattr(self, name, checked_pattern(name, getattr(self, name), check))
        for name, values in self.choices.items():
            _check_choice(name, getattr(self, name), values)
        check_target_fields(self, pattern_fields=tuple(self.pattern_fields))

    def to_dict(self) -> dict[str, Any]:
        """All fields; without those that PEFT's config lacks, where they say nothing."""
        fields = super().to_dict()
        return {name: value for name, value in fields.items() if name not in self.not_in_peft or value is not None}

    def unused_patterns(self, paths: Sequence[str]) -> str:
        """Describes the keys of its patterns that match no module; see ``AdapterConfig``."""
        return unused_patterns(self, tuple(self.pattern_fields), paths)


def _check_choice(name: str, value: object, choices: Sequence[Any]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in choices):
        shown_choices = ", ".join(map(repr, choices))
        kind = BiasError if name == "bias" else ConfigError
        near = did_you_mean(str(value), [one for one in choices if isinstance(one, str)])
        raise kind(f"{name} must be one of {shown_choices}, not {shown(value)}.{near}", field=name)


def check_filled(config: Any) -> None:
    """Raises ConfigError for None where a number, a text, True or False is the default and None no choice."""
    for one in dataclasses.fields(config):
        needs_value = isinstance(one.default, bool | int | float | str) and None not in config.choices.get(one.name, ())
        if getattr(config, one.name) is None and needs_value:
            raise ConfigError(f"{one.name} must have a value, such as {one.default!r}, not None", field=one.name)


@dataclass
class RankedConfig(LayersConfig):
    """A rank and an alpha, which patterns may change for some layers.

    Attributes:
        r: rank of the factors: how much an adapter can learn, and its size.
        alpha: what the adapter adds is multiplied by alpha / r.
        rank_pattern: layer name or pattern -> another r.
        alpha_pattern: layer name or pattern -> another alpha.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)

    def rank_at(self, path: str) -> int:
        """The rank at a module path."""
        return int(pattern_table(self, "rank_pattern").get(path, self.r))

    def alpha_at(self, path: str) -> float:
        """The alpha at a module path."""
        return float(pattern_table(self, "alpha_pattern").get(path, self.alpha))

    def scaling_at(self, path: str) -> float:
        """alpha / r at a module path."""
        return self.alpha_at(path) / self.rank_at(path)


class LayerByLayer:
    """A config that may say something of one layer alone, and bring classes that adapt some instead of the engine."""

    def with_layer(self, path: str, layer_config: Any, *, target: bool) -> Any:
        """A copy that says of one layer what another config of the method says, so that a file holds it.

        Args:
            path: of the layer.
            layer_config: what the adapter has there.
            target: whether the layer becomes a target, which it was not.

        Raises:
            ConfigError: one config cannot say both.
        """
        raise NotImplementedError

    def custom_layer_class(self, module: nn.Module) -> type[nn.Module] | None:
        """A class of somebody else's for a layer, or None; see ``engine.custom_layers``."""
        raise NotImplementedError

    def make_custom_layer(self, layer_class: type[nn.Module], module: nn.Module, path: str, name: str) -> nn.Module:
        """Makes an object of such a class.

        Args:
            layer_class: the class.
            module: the frozen layer.
            path: of the layer.
            name: of the adapter.
        """
        raise NotImplementedError
