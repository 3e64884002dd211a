"""RandLoRA: a full rank from scaled random bases that all layers share (Albert et al. 2025, arXiv:2502.00987).

    Δ = scaling Σ_b B_b diag(λ_b) A diag(γ_b)        A: (r, small), B_b: (large, r), frozen; λ_b: (r,), γ_b: (small,)

The number of bases b is such that their ranks add up to the smaller side of the weight. On a layer with fewer outputs
than inputs Δ is transposed. The bases have the size of the largest layer; smaller layers use a part of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.config.layers_config import HasFanInFanOut, TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, Rescales
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shape, Shapes
from nbpeft.engine.contract.bindable import axis_size
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.shared_state import DrawnTensors
from nbpeft.engine.contract.weight_delta import keeping_inputs
from nbpeft.engine.kernels.numerics import compute_dtype

LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"
BASIS_A, BASIS_B = "randlora_A", "randlora_B"


@dataclass
class RandLoraConfig(HasFanInFanOut, TrainsBiases):
    """Config of RandLoRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: rank of a basis: a smaller one trains more numbers.
        projection_prng_key: seed of the bases.
        save_projection: save the bases too; otherwise they are drawn again from the seed.
        sparse: bases of zeros and, for a third of the entries, ones and minus ones.
        very_sparse: the same with fewer, one of the root of the smaller side.
        randlora_dropout: dropout probability of the adapter's input, from 0 to 1.
        randlora_alpha: the delta is multiplied by randlora_alpha / r.
        init_weights: start at the base model; False for random numbers.
    """

    r: int = field(default=32)
    projection_prng_key: int = field(default=0)
    save_projection: bool = field(default=True)
    sparse: bool = field(default=False)
    very_sparse: bool = field(default=False)
    randlora_dropout: float = field(default=0.0)
    randlora_alpha: float = field(default=640)
    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "RANDLORA"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    counts: ClassVar[tuple[str, ...]] = ("r",)
    shares: ClassVar[tuple[str, ...]] = ("randlora_dropout",)
    seeds: ClassVar[tuple[str, ...]] = ("projection_prng_key",)
    value_fields: ClassVar[tuple[str, ...]] = ("randlora_alpha", "randlora_dropout", "init_weights")

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return float(self.randlora_alpha) / self.r

    def sparsity(self, small: int) -> float | None:
        """One entry of so many is not zero in bases for a weight with that smaller side; None for dense ones."""
        if self.very_sparse:
            return math.sqrt(small)
        return 3.0 if self.sparse else None


class Bases(DrawnTensors):
    """A, (r, 1, small), and B, (large, bases, r): frozen, and drawn from a seed."""

    names: ClassVar[tuple[str, str]] = (BASIS_A, BASIS_B)
    made_from: ClassVar[tuple[str, ...]] = (*DrawnTensors.made_from, "sparse", "very_sparse")

    @classmethod
    def tensor_shapes(cls, config: RandLoraConfig, features: Mapping[str, tuple[int, int]]) -> Shapes:
        sizes = list(zip(*features.values(), strict=True)) or [(0,), (0,)]
        small, large = sorted((max(sizes[0]), max(sizes[1])))
        return {BASIS_A: (config.r, 1, small), BASIS_B: (large, -(-small // config.r), config.r)}

    @classmethod
    def drawn(
        cls, config: RandLoraConfig, shapes: Mapping[str, Shape], generator: torch.Generator
    ) -> dict[str, Tensor]:
        sparsity = config.sparsity(shapes[BASIS_A][2])
        found = _dense_bases(shapes, generator) if sparsity is None else _sparse_bases(shapes, generator, sparsity)
        return {name: tensor / tensor.std() for name, tensor in found.items()}


def _dense_bases(shapes: Mapping[str, Shape], generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform numbers; B one basis after the other."""
    large, count, rank = shapes[BASIS_B]
    first = _uniform(shapes[BASIS_A], generator)
    return {BASIS_A: first, BASIS_B: torch.cat([_uniform((large, 1, rank), generator) for _ in range(count)], 1)}


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """In bfloat16, in which PEFT draws and scales them."""
    bound = 1 / math.sqrt(max(shape[2], 1))
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def _sparse_bases(shapes: Mapping[str, Shape], generator: torch.Generator, sparsity: float) -> dict[str, Tensor]:
    """Zeros, and as many ones as minus ones: one entry of ``sparsity`` together."""
    bases = {}
    for name in (BASIS_A, BASIS_B):
        drawn = torch.rand(shapes[name], generator=generator, dtype=torch.float32)
        share = 1 / (2 * sparsity)
        bases[name] = (drawn > 1 - share).float() - (drawn < share).float()
    return bases


@register(
    RandLoraConfig,
    label="RandLoRA",
    listing=Listing(
        when="full rank from few parameters",
        paper="arXiv:2502.00987",
        summary=lambda config: {"r": str(config.r), "α": f"{config.randlora_alpha:g}"},
        smaller=lambda config: config.copy(r=config.r * 2),
    ),
    default_targets=usual_targets,
    sample_configs={
        "r4": {"r": 4, "randlora_alpha": 8},
        "drawn": {"r": 5, "randlora_alpha": 5, "sparse": True, "save_projection": False},
    },
    shares=SharedTensors(state=Bases),
)
class RandLora(Adapter, Rescales):
    """The scales of the bases on one layer."""

    peft: ClassVar[PeftNames] = PeftNames(
        "randlora_lambda randlora_gamma",
        "randlora_A randlora_B randlora_dropout r scaling",
        attributes={"r": "rank"} | {name: f"bases.{name}" for name in (BASIS_A, BASIS_B)},
    )
    from_config: ClassVar[Mapping[str, str]] = {"scaling": "scaling", "dropout": "randlora_dropout"}
    identity: ClassVar[Mapping[str, float]] = {LAMBDA: 0.0}

    bases: Bases
    dropout: float

    @classmethod
    def parameter_shapes(cls, config: RandLoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """λ, (r, bases), and γ, (bases, the smaller of in and out)."""
        check_linear("RandLoRA", path, kind)
        small = min(kind.features(module))
        count = -(-small // config.r)
        return {LAMBDA: (config.r, count), GAMMA: (count, small)}

    @classmethod
    def initial_tensors(cls, config: RandLoraConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        """λ at zeros, or random, and γ at one by the larger side."""
        scales, shape = site.new(site.shapes[LAMBDA], normal_), site.shapes[GAMMA]
        largest = max(shape) if config.init_weights else max(site.base.in_features, site.base.out_features)
        return {
            LAMBDA: scales.zero_() if config.init_weights else scales,
            GAMMA: site.new(shape).fill_(1 / largest),
        }

    def prepare(self, config: RandLoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        """Refers to the bases, which the first layer has as a module."""
        self.bind(bases=site.shared)

    rank: int = axis_size(LAMBDA)  # The rank of a basis

    def _factors(self, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """The bases with their scales as two matrices, (width, in) and (out, width), on the device of the layer."""
        scales, columns = self.tensor(LAMBDA), self.tensor(GAMMA)
        (count, small), large = columns.shape, max(base.in_features, base.out_features)
        whole_a, whole_b = self.bases.matrices
        first = whole_a[:, :, :small].to(columns.device)
        second = whole_b[:large, :count].to(columns.device).flatten(1)

        def scaled(scales: Tensor, columns: Tensor) -> Tensor:
            return (scales[:, :, None] * first * columns).flatten(0, 1)

        trained = keeping_inputs(scaled, scales, columns)
        return (trained, second) if small == base.in_features else (second.T, trained.T)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        first, second = self._factors(base)
        dtype = compute_dtype(x, self.tensor(LAMBDA))
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        return F.linear(F.linear(dropped, first.to(dtype)), second.to(dtype)) * self.scaling

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        first, second = self._factors(base)
        return second @ first * self.scaling
