"""Two trained vectors a layer around frozen random projections that all layers share.

    y = W x + b ∘ B (d ∘ (A x))

The projections are as large as the largest layer needs; a smaller one takes their first columns and rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.config_checks import check_linear, check_number, check_seed
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, ConvertsToLora, LowRankDelta
from nbpeft.engine.contract.base import BaseLayer, LayerKind
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.contract.shared_state import DrawnTensors
from nbpeft.engine.kernels.numerics import compute_dtype


@dataclass
class VectorsConfig(LayersConfig):
    """Fields of methods with two vectors a layer around random projections.

    Attributes:
        r: rank of the shared projections; it costs r numbers a layer, so it can be large.
        projection_prng_key: seed of the projections.
        save_projection: save the projections too; otherwise they are drawn again from the seed.
        d_initial: what the vector between the projections starts with.
        fan_in_fan_out: accepted for PEFT's sake: the layer itself says how its weight is stored.
        bias: which biases of the model are trained too.
        init_weights: start at the base model; False for random vectors.
    """

    r: int = field(default=256)
    projection_prng_key: int = field(default=0)
    save_projection: bool = field(default=True)
    d_initial: float = field(default=0.1)
    fan_in_fan_out: bool = field(default=False)
    bias: str = field(default="none")
    init_weights: bool = field(default=True)

    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    counts: ClassVar[tuple[str, ...]] = ("r",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("projection_prng_key", self.projection_prng_key)
        check_number("d_initial", self.d_initial)

    @property
    def dropout(self) -> float:
        """Share of the adapter's inputs that are dropped in training."""
        raise NotImplementedError


class Projections(DrawnTensors):
    """A, (rows of a rank · r, largest in), and B, (largest out, r): frozen, and drawn from a seed."""

    rows_of_rank: ClassVar[int] = 1

    @classmethod
    def tensor_shapes(
        cls, config: VectorsConfig, features: Mapping[str, tuple[int, int]]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes that suit the largest layers; see ``SharedState``."""
        sizes = list(zip(*features.values(), strict=True)) or [(0,), (0,)]
        shapes = (config.r * cls.rows_of_rank, max(sizes[0])), (max(sizes[1]), config.r)
        return dict(zip(cls.names, shapes, strict=True))

    @classmethod
    def drawn(
        cls, config: VectorsConfig, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Draws A, then B; see ``DrawnTensors``."""
        return {name: _drawn(shapes[name], generator) for name in cls.names}


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform numbers whose variance is 2 / fan-in (He et al.)."""
    bound = math.sqrt(6 / max(shape[1], 1))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


class ProjectedVectors(Adapter, ConvertsToLora):
    """The two vectors of one layer: b, over its outputs, and d, between the projections.

    A subclass gives ``names``, those of b and d, and ``between``, the class of the projections.
    """

    names: ClassVar[tuple[str, str]]
    between: ClassVar[type[Projections]]

    @classmethod
    def parameter_shapes(
        cls, config: VectorsConfig, path: str, module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[int, ...]]:
        """b, (out,), and d, (rows of A,); see ``Adapter``."""
        check_linear(method_of(config).label, path, kind)
        shapes = (kind.features(module)[1],), (cls.between.rows_of_rank * config.r,)
        return dict(zip(cls.names, shapes, strict=True))

    @classmethod
    def create(cls, config: VectorsConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded vectors or makes new ones; see ``Adapter``."""
        if tensors is None:
            options: Any = {"device": site.base.device, "dtype": site.dtype}
            shape_b, shape_d = (site.shapes[name] for name in cls.names)
            d = site.new(shape_d, normal_)
            if config.init_weights:
                new = torch.zeros(shape_b, **options), d.fill_(float(config.d_initial))
            else:
                new = torch.ones(shape_b, **options), d
            tensors = dict(zip(cls.names, new, strict=True))
        assert isinstance(site.shared, Projections)
        made = cls(tensors, site.shared)
        made.configure(config, site.path)
        return made

    def __init__(self, tensors: Mapping[str, Tensor], projections: Projections) -> None:
        super().__init__()
        self._parameters.update({name: nn.Parameter(tensors[name]) for name in self.names})
        self.__dict__["projections"] = projections  # the first layer holds them as a module

    projections: Projections
    dropout: float

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """b and d."""
        b, d = (self.held[name] for name in self.names)
        return b, d

    def parts(self, base: BaseLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, d and b of this layer, where it is."""
        (first, second), (b, d) = self.projections.matrices, self.vectors
        return first[:, : base.in_features].to(b.device), second[: base.out_features].to(b.device), d, b

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``b ∘ B (d ∘ (A dropout(x)))``; see ``Adapter``."""
        first, second, d, b = self.parts(base)
        dtype = compute_dtype(x, b)
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        hidden = F.linear(dropped, first.to(dtype)) * d.to(dtype)
        return F.linear(hidden, second.to(dtype)) * b.to(dtype)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``(b ∘ B) (d ∘ A)``; see ``Adapter``."""
        first, second, d, b = self.parts(base)
        return (second * b[:, None]) @ (first * d[:, None])

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """``d ∘ A`` and ``b ∘ B``; see ``ConvertsToLora``."""
        first, second, d, b = self.parts(base)
        return LowRankDelta(first * d[:, None], second * b[:, None], 1.0)

    @property
    def delta_rank(self) -> int | None:
        """The rank of the projections."""
        return int(self.projections.matrices[1].shape[1])

    @classmethod
    def size_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The rank, as the vector between the projections tells it."""
        return shapes[cls.names[1]][0] // cls.between.rows_of_rank

    def reset_(self, base: BaseLayer) -> None:
        """Overwrites the vector over the output with zeros."""
        self.vectors[0].detach().zero_()

    def configure(self, config: VectorsConfig, path: str) -> None:
        """Takes the dropout of a config over."""
        self.__dict__["dropout"] = config.dropout

    def keep_settings(self, change: Transaction) -> None:
        """Records the dropout."""
        change.keep_attributes(self, "dropout")

    def extra_repr(self) -> str:
        """What ``repr`` shows of it."""
        return f"r={self.delta_rank}"
