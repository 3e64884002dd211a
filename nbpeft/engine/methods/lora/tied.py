"""LoRA on a layer that shares its weight with the input embedding, and its factors with the embedding's adapter.

    W + s * (B A)^T of the embedding, W + s * B' A' of the head          A' = B^T, B' = A^T

Stored as (vocabulary, features), both are the same change of the shared weight, which stays tied when they are merged.
Another embedding with that weight, such as a decoder's, uses A and B unchanged. The single pair of parameters belongs
to the embedding's adapter, and gets gradients from all uses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import Adapter, AdapterSite, TiedAdapter
from nbpeft.engine.contract.base import BaseLayer, Shape
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.initialization.inits import fill_of, skip_built
from nbpeft.engine.methods.lora.low_rank import LowRank, LowRankLookup
from nbpeft.engine.methods.lora.peft_modules import TiedFactor
from nbpeft.engine.methods.lora.plain import LowRankProduct
from nbpeft.errors import ConfigError

_INITS = ("default", "random", "gaussian")


def check_tied(config: LoraConfig, paths: Sequence[str]) -> None:
    """Raises ConfigError if some layers cannot share factors with a config.

    Args:
        config: the adapter's config.
        paths: paths of the layers.

    Raises:
        ConfigError: its init depends on each layer's weight, or its patterns give the layers different values.
    """
    if config.init_name not in _INITS:
        raise ConfigError(
            f"ensure_weight_tying works with init_lora_weights True, False or 'gaussian' on {' and '.join(paths)}, not "
            f"{config.init_lora_weights!r}",
            field="init_lora_weights",
        )
    settings = {path: (config.rank_at(path), config.alpha_at(path)) for path in paths}
    first, other = paths[0], next((path for path in paths if settings[path] != settings[paths[0]]), None)
    if other is not None:
        ranks, alphas = zip(settings[first], settings[other], strict=True)
        field, values = ("rank_pattern", ranks) if ranks[0] != ranks[1] else ("alpha_pattern", alphas)
        raise ConfigError(
            f"ensure_weight_tying: {first} and {other} share their factors, but {field} sets {values[0]:g} and "
            f"{values[1]:g} for them; name both in it or neither",
            field=field,
        )


class TiedProduct(LowRankProduct, TiedAdapter):
    """A product with the factors of the adapter on another layer, transposed if the layers' weights are.

    Attributes:
        source: that adapter.
    """

    _drawn: Mapping[str, Tensor] = {}
    _loaded: Mapping[str, Tensor] = {}

    @classmethod
    def create(cls, config: LoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Creates an adapter without its source, but with loaded tensors or new ones drawn as for a head."""
        made = cls({}, site.base.kind, config, site.path)
        made.bind(_drawn=_drawn(config, site) if tensors is None else {}, _loaded=dict(tensors or {}))
        return made

    @torch.no_grad()
    def tie_to(self, source: Adapter) -> None:
        """Shares the factors of another adapter; new factors are initialized as for the head, as in PEFT.

        Loaded factors are written to that adapter: a file may contain them for this layer only.
        """
        drawn, loaded = self._drawn, self._loaded
        self.bind(source=source, _drawn={}, _loaded={})
        for name, value in (loaded if self._is_alike else {**drawn, **loaded}).items():
            self.tensor(name).copy_(value)

    @classmethod
    def tied_tensors(cls, names: Collection[str], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        alike = {name: source[name] for name in names if name in source}
        pairs = zip(LowRank.factor_names, reversed(LowRankLookup.factor_names), strict=True)
        return alike or {name: source[other].T for name, other in pairs if other in source}

    def tensor(self, name: str, *, optional: bool = False) -> Any:
        return self._views().get(name) if optional else self._views()[name]

    def _views(self) -> dict[str, Tensor]:
        names = {*LowRank.factor_names, *LowRankLookup.factor_names}
        given = {} if self.source is None else {name: self.source.tensor(name, optional=True) for name in names}
        found = {name: factor for name, factor in given.items() if factor is not None}
        return self.tied_tensors(self.factor_names, found)

    @property
    def _is_alike(self) -> bool:
        """Whether the factors are the source's without transposition."""
        return self.source is not None and self.source.tensor(self.factor_names[0], optional=True) is not None

    @property
    def computes_factors(self) -> bool:
        """No: they are views of parameters."""
        return False

    @property
    def peft(self) -> PeftNames:  # type: ignore[override]
        """The names of a product; factors that are not named as the source's are shown as modules."""
        names = LowRankProduct.peft
        return names if self._is_alike else replace(names, modules=(*names.modules, *self.factor_names))

    def peft_module(self, name: str, base: BaseLayer) -> nn.Module | None:
        return TiedFactor(self, name) if name in self.factor_names else super().peft_module(name, base)

    def saved_tensors(self, shapes: Callable[[], Mapping[str, Shape]]) -> dict[str, Tensor]:
        return self._views()

    def swap_refusal(self) -> str:
        """Why its factors cannot be hot-swapped: two layers share them."""
        return "uses the factors of another layer (ensure_weight_tying)"


def _drawn(config: LoraConfig, site: AdapterSite) -> dict[str, Tensor]:
    """Initial factors of a head, which are copied to the embedding's factors."""
    skip_built(config, site)
    if config.init_name == "random":
        return {}
    (name_A, shape_A), (name_B, shape_B) = site.shapes.items()
    fill = fill_of(config, site.path)
    # A is filled as a transposed view of the embedding's tensor, in the memory order of that tensor.
    return {name_A: site.new(shape_A[::-1], lambda tensor: fill(tensor.T)).T, name_B: site.new(shape_B)}
