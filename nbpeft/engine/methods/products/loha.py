"""LoHa: the Hadamard product of two low-rank products (Hyeon-Woo et al. 2021, arXiv:2108.06098, and LyCORIS).

    Δ = scaling (A1 B1) ∘ (A2 B2)        A: (out, r), B: (r, in); the rank of Δ is up to r²

A convolution's weight is taken as a matrix (out, in * kernel), or with ``use_effective_conv2d`` each of the two as a
small core (r, r, *kernel) between A (r, out) and B (r, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_takes_features
from nbpeft.engine.config.layers_config import RankedConfig
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import AdapterSite, ConvertsToLora, LowRankDelta
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import linear_
from nbpeft.engine.contract.method_records import FileFormat, Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import ScaledDelta
from nbpeft.errors import ConfigError

_MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@dataclass
class LoHaConfig(RankedConfig):
    """Config of LoHa. Field names and defaults are PEFT's; see ``RankedConfig`` for the target and rank fields.

    Attributes:
        rank_dropout: share of the rows of what is added that are dropped in training, from 0 to 1.
        module_dropout: probability that a layer adds nothing in a call of the training, from 0 to 1.
        use_effective_conv2d: take a convolution with a kernel larger than 1 apart by its dimensions.
        init_weights: start at the base model; False for random factors.
    """

    rank_dropout: float = field(default=0.0)
    module_dropout: float = field(default=0.0)
    use_effective_conv2d: bool = field(default=False)
    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "LOHA"
    shares: ClassVar[tuple[str, ...]] = ("rank_dropout", "module_dropout")
    value_fields: ClassVar[tuple[str, ...]] = (
        *(*RankedConfig.value_fields, "rank_dropout", "module_dropout", "init_weights"),
    )


@register(
    LoHaConfig,
    label="LoHa",
    listing=Listing(
        when="high rank from few parameters; common for image models",
        paper="arXiv:2108.06098",
        summary=lambda config: {"r": str(config.r), "α": f"{config.alpha:g}"},
    ),
    default_targets=usual_targets,
    sample_configs={"r3": {"r": 3, "alpha": 4}, "cores": {"r": 2, "use_effective_conv2d": True}},
    files=FileFormat(prefix="hada_"),
)
class LoHa(ScaledDelta, ConvertsToLora):
    """Four factors on one layer, and two cores for a convolution that is decomposed."""

    identity: ClassVar[Mapping[str, float]] = {"hada_w2_b": 0.0}
    peft: ClassVar[PeftNames] = PeftNames(
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
        "r alpha scaling rank_dropout rank_dropout_scale module_dropout",
        attributes=ScaledDelta.peft.attributes,
    )

    @classmethod
    def parameter_shapes(cls, config: LoHaConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A and B, twice, and the cores of a convolution."""
        check_takes_features("LoHa", path, kind)
        rank, (rows, columns, *kernel) = config.rank_at(path), kind.weight_shape(module)
        if config.use_effective_conv2d and any(size != 1 for size in kernel):
            if len(kernel) > 2:
                raise ConfigError(f"{path}: use_effective_conv2d does not work in three dimensions", path=path)
            core = (rank, rank, *kernel, *[1] * (2 - len(kernel)))
            shapes: list[tuple[int, ...]] = [(rank, rows), (rank, columns)] * 2
            return dict(zip((*_MATRICES, *_CORES), (*shapes, core, core), strict=True))
        return dict(zip(_MATRICES, [(rows, rank), (rank, columns * math.prod(kernel))] * 2, strict=True))

    @classmethod
    def initial_tensors(cls, config: LoHaConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        zero = "hada_w2_b" if config.init_weights else ""
        return {name: site.new(shape, None if name == zero else linear_) for name, shape in site.shapes.items()}

    def unscaled_delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """The Hadamard product."""
        pairs = parameters[:2], parameters[2:4]
        if len(parameters) == len(_MATRICES):
            first, second = (A @ B for A, B in pairs)
        else:
            cores = parameters[len(_MATRICES) :]
            first, second = (
                torch.einsum("ijkl,ip,jr->prkl", core, *pair) for core, pair in zip(cores, pairs, strict=True)
            )
        return (first * second).view(base.kind.weight_shape(base.module))

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta | None:
        """Products of each column of A1 with each of A2, and of each row of B1 with each of B2."""
        if not base.kind.is_linear:
            return None
        first_A, first_B, second_A, second_B = self.tensors
        up = torch.einsum("or,os->ors", first_A, second_A).flatten(1)
        down = torch.einsum("ri,si->rsi", first_B, second_B).flatten(0, 1)
        return LowRankDelta(down, up, float(self.scaling))

    @property
    def delta_rank(self) -> int | None:
        return self.rank**2
