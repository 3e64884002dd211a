"""Base classes of VeRA and PVeRA: the config, the frozen projections, and the tensors of a layer.

The projections have the size of the largest layer; smaller layers use their first columns and rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear, check_number, check_seed
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, HotSwaps
from nbpeft.engine.contract.base import BaseLayer, LayerKind
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.contract.shared_state import DrawnTensors


@dataclass
class VectorsConfig(LayersConfig):
    """Fields of methods with two vectors a layer around random projections.

    Attributes:
        r: rank of the shared projections; it costs r numbers a layer, so it can be large.
        projection_prng_key: seed of the projections.
        save_projection: save the projections too; otherwise they are drawn again from the seed.
        d_initial: initial value of the vector between the projections.
        fan_in_fan_out: whether layers store their weight as (in, out); set when the adapter is added.
        bias: which biases of the model are also trained.
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
        """Dropout probability of the adapter's input."""
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


class ProjectedVectors(Adapter, HotSwaps):
    """The two vectors of one layer: b, over its outputs, and d, between the projections.

    A subclass gives ``names``, those of b and d, and ``between``, the class of the projections.
    """

    names: ClassVar[tuple[str, str]]
    between: ClassVar[type[Projections]]
    from_config: ClassVar[Mapping[str, str]] = {"dropout": "dropout"}

    @classmethod
    def parameter_shapes(
        cls, config: VectorsConfig, path: str, module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[int, ...]]:
        """b, (out,), and d, (rows of A,); see ``Adapter``."""
        check_linear(method_of(config).label, path, kind)
        shapes = (kind.features(module)[1],), (cls.between.rows_of_rank * config.r,)
        return dict(zip(cls.names, shapes, strict=True))

    @classmethod
    def initial_tensors(cls, config: VectorsConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        """b at zeros and d at ``d_initial``, or random; see ``Adapter``."""
        name_b, name_d = cls.names
        b, d = site.new(site.shapes[name_b]), site.new(site.shapes[name_d], normal_)
        return (
            {name_b: b, name_d: d.fill_(float(config.d_initial))} if config.init_weights else {name_b: b + 1, name_d: d}
        )

    def prepare(self, config: VectorsConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        """Refers to the projections, which the first layer has as a module; see ``Adapter``."""
        self.bind(projections=site.shared)

    projections: Projections
    dropout: float

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """b and d."""
        b, d = (self.tensor(name) for name in self.names)
        return b, d

    def parts(self, base: BaseLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, d and b of this layer, on its device."""
        (first, second), (b, d) = self.projections.matrices, self.vectors
        return first[:, : base.in_features].to(b.device), second[: base.out_features].to(b.device), d, b

    @property
    def delta_rank(self) -> int | None:
        """The rank of the projections."""
        return int(self.projections.matrices[1].shape[1])

    @classmethod
    def size_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The rank: the length of the vector between the projections."""
        return shapes[cls.names[1]][0] // cls.between.rows_of_rank
