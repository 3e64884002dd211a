"""The config of ShadowPEFT."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from nbpeft.engine.config.config_checks import check_count, check_number
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.config.targets import Matcher, is_all_linear
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.methods.shadow.network import blocks_of, recipe_for
from nbpeft.engine.methods.shadow.recipe import Recipe
from nbpeft.errors import ConfigError, shown

MIRROR = "mirror"
_SIZES = ("shadow_num_hidden_layers", "shadow_hidden_size", "shadow_num_attention_heads", "shadow_intermediate_size")


@dataclass
class ShadowConfig(LayersConfig):
    """Config of ShadowPEFT. Field names and defaults are PEFT's.

    Attributes:
        target_modules: consecutive blocks of the decoder to adapt; None for all.
        exclude_modules: names of blocks that are not adapted, or a pattern.
        r: rank of the change of a block's input.
        shadow_alpha: factor on that change.
        shadow_dropout: dropout probability of the change's input.
        init_weights: start with zeros in the second factor, so that nothing is added at first.
        shadow_model: 'mirror' for a new network of the model's architecture, or folder or hub id of another network.
        shadow_num_hidden_layers: layers of a mirror; None for 1.
        shadow_hidden_size: features of a mirror; None for the model's.
        shadow_num_attention_heads: attention heads of a mirror; None for the model's.
        shadow_intermediate_size: features between the feed-forward layers of a mirror; None for the model's.
        share_embeddings: let a mirror read the model's input embeddings, as far as the sizes are the same.
        update_hidden_size: features inside the two networks that advance the state; None for r.
        auxiliary_loss_weight: factor on the network's own loss, which is added to the model's loss.
        layers_to_transform: has no effect, as in PEFT; name the blocks in target_modules.
        layers_pattern: likewise.
        modules_to_save: names of other modules that are copied, trained as a whole and saved.

    Raises:
        ConfigError: a value is invalid.
    """

    target_modules: Collection[str] | str | None = field(default=None)
    exclude_modules: Collection[str] | str | None = field(default=None)
    r: int = field(default=8)
    shadow_alpha: float = field(default=0.1)
    shadow_dropout: float = field(default=0.2)
    init_weights: bool = field(default=True)
    shadow_model: str = field(default=MIRROR)
    shadow_num_hidden_layers: int | None = field(default=None)
    shadow_hidden_size: int | None = field(default=None)
    shadow_num_attention_heads: int | None = field(default=None)
    shadow_intermediate_size: int | None = field(default=None)
    share_embeddings: bool = field(default=True)
    update_hidden_size: int | None = field(default=None)
    auxiliary_loss_weight: float = field(default=0.05)

    method_type: ClassVar[str] = "SHADOW"
    counts: ClassVar[tuple[str, ...]] = ("r",)
    shares: ClassVar[tuple[str, ...]] = ("shadow_dropout",)
    value_fields: ClassVar[tuple[str, ...]] = ("shadow_alpha", "shadow_dropout", "auxiliary_loss_weight")
    condenses_targets: ClassVar[bool] = False
    places: ClassVar[tuple[str, ...]] = ()
    """Paths of the adapted blocks in the model, once resolved."""
    recipe: ClassVar[Recipe | None] = None
    """How to build the network for the model, once resolved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*_SIZES, "update_hidden_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("shadow_alpha", "auxiliary_loss_weight"):
            check_number(name, getattr(self, name))
        if self.auxiliary_loss_weight < 0:
            raise ConfigError(
                f"auxiliary_loss_weight must not be negative, but it is {self.auxiliary_loss_weight:g}",
                field="auxiliary_loss_weight",
            )
        if is_all_linear(self.target_modules):
            raise ConfigError(
                "target_modules are the blocks of the decoder, not its linear layers; leave it out for all of them",
                field="target_modules",
            )
        given = [name for name in _SIZES if getattr(self, name) is not None]
        if self.shadow_model != MIRROR and given:
            raise ConfigError(
                f"shadow_model {shown(self.shadow_model)} determines its sizes: leave out these mirror-only overrides, "
                f"{', '.join(given)}",
                field=given[0],
            )

    def on_model(self, model: nn.Module, planned: Callable[[AdapterConfig], Any]) -> Self:
        """Raises ConfigError if the model is not a decoder; see ``AdapterConfig``."""
        blocks_of(model)
        return self

    def fill_in_sizes(self, model: nn.Module, width: int) -> None:
        """Resolves the blocks and the network's recipe; see ``AdapterConfig``."""
        backbone, blocks = blocks_of(model)
        if self.target_modules is None:
            self.target_modules = set(blocks)
        matcher = Matcher(self.target_modules, self.exclude_modules, self.layers_to_transform, self.layers_pattern)
        numbers = [number for number, one in enumerate(blocks) if matcher.matches(one) and not matcher.excluded(one)]
        missing = matcher.missing()
        if not numbers or missing:
            raise ConfigError(
                f"target_modules {shown(missing[0] if missing else self.target_modules)} names none of the blocks of "
                f"{type(model).__name__}, {blocks[0]} to {blocks[-1]}; leave it out for all of them",
                field="target_modules",
            )
        if numbers[-1] - numbers[0] >= len(numbers):
            raise ConfigError(
                f"the blocks must follow each other, and {blocks[numbers[0]]} to {blocks[numbers[-1]]} leaves some out",
                field="target_modules",
            )
        made = recipe_for(self, model, backbone)
        self.set_derived(places=tuple(blocks[number] for number in numbers), recipe=made)
