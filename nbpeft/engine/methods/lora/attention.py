"""LoRA on nn.MultiheadAttention: one adapter on the projections of query, key and value together, one on ``out_proj``.

    W_in + s * B A          A (r, embed), B (3 embed, r)
    W_out + 2 s * B A       A (r, embed), B (embed, r)

The 2 is PEFT's, up to 0.21 (huggingface/peft#3774): its files were trained with it, and PEFT applies it to ours.
The deltas are added to the weights before the call, so there is no dropout of an input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn

from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import skip, skip_linear
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.initialization.inits import fill_of
from nbpeft.engine.methods.lora.plain import PlainLowRank
from nbpeft.engine.wrappers.factored_weight import AdaptsParameters, Product
from nbpeft.errors import ConfigError

_OUT_PROJ_TIMES = 2.0
"""Factor on the delta of ``out_proj``."""


class AttentionLoRA(PlainLowRank, AdaptsParameters):
    """A LoRA adapter on one of the two weights of an attention module."""

    @classmethod
    def parameter_shapes(cls, config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A and B; see ``Adapter``.

        Raises:
            ConfigError: the config has a setting that does not work on an attention module.
        """
        place = _attention_path(path, kind)
        if config.lora_bias or config.init_name not in ("default", "random", "gaussian"):
            field = "lora_bias" if config.lora_bias else "init_lora_weights"
            raise ConfigError(
                f"{place}: {field}={getattr(config, field)!r} does not work on nn.MultiheadAttention; leave that out "
                "or exclude it",
                field=field,
                path=place,
            )
        return super().parameter_shapes(config, place, module, kind)

    @classmethod
    def create(cls, config: LoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded factors or makes new ones."""
        site = replace(site, path=_attention_path(site.path, site.base.kind))
        if tensors is None:
            _skip_first(config, site)
        return super().create(config, site, tensors)

    @property
    def _times(self) -> float:
        return _OUT_PROJ_TIMES if self.low_rank.kind.is_linear else 1.0

    def configure(self, config: Any, path: str) -> None:
        """Sets the scaling of the attention module, whose path the patterns of a config mean."""
        place = _attention_path(path, self.low_rank.kind)
        self.rescale(config.scaling_at(place), trained=True)
        self.bind(alpha=config.alpha_at(place))

    @property
    def computes_by_parts(self) -> bool:
        """False: the attention module computes with the product, and does not call the factors."""
        return False

    def parameter_products(self, base: BaseLayer) -> Sequence[Product]:
        lora_A, lora_B = self.trained_factors
        return (Product(lora_B, lora_A, self.scaling * self._times),)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer, fused: bool = False) -> Tensor:
        """The delta if ``out_proj`` is called on its own."""
        return super().forward(x, base_output, base) * self._times

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        return super().delta_weight(weight, base) * self._times

    def add_to_(self, weight: Tensor, base: BaseLayer, scale: float) -> None:
        super().add_to_(weight, base, scale * self._times)

    def delta_size(self, weight: Tensor, base: BaseLayer) -> tuple[float, int | None]:
        norm, directions = super().delta_size(weight, base)
        return norm * self._times, directions


def _skip_first(config: LoraConfig, site: AdapterSite) -> None:
    """Draws as PEFT does for the first adapter of a module: factors for ``out_proj``, which are drawn again later."""
    if not site.base.kind.is_linear and not site.base.adapters:
        rank, width, device = config.rank_at(site.path), site.base.in_features, site.device
        skip_linear(device, (rank, width), (width, rank))
        if config.init_name != "random":
            skip(fill_of(config, site.path), device, (rank, width))


def _attention_path(path: str, kind: LayerKind) -> str:
    """Path of the attention module, whose rank and alpha both adapters have."""
    return path.rpartition(".")[0] if kind.is_linear else path
