"""LoKr: a Kronecker product of two small matrices (Edalati et al. 2022, arXiv:2212.10650, and LyCORIS).

    Δ = scaling W1 ⊗ W2        W1: (l, m), W2: (k, n), where out = l k and in = m n

W2, and with ``decompose_both`` W1 too, is a product of rank r where that is smaller. On linear layers Δ itself is
never built: ``x`` as a matrix (m, n) is multiplied from both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_takes_features
from nbpeft.engine.config.layers_config import RankedConfig
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import AdapterSite, ConvertsToLora, LowRankDelta
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import linear_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import ScaledDelta, keeping_inputs
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.errors import ConfigError

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B, T2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"


@dataclass
class LoKrConfig(RankedConfig):
    """Config of LoKr. Field names and defaults are PEFT's; see ``RankedConfig`` for the target and rank fields.

    Attributes:
        rank_dropout: share of the rows of what is added that are dropped in training, from 0 to 1.
        module_dropout: probability that a layer adds nothing in a call of the training, from 0 to 1.
        use_effective_conv2d: take a convolution with a kernel larger than 1 apart by its dimensions.
        decompose_both: let the first matrix be a product of rank r, too.
        decompose_factor: how large the first matrix should be about; -1 for the square root of the weight's sizes.
        rank_dropout_scale: make the rows that rank_dropout leaves larger by the share of those that it drops.
        init_weights: True starts at the base model with the first matrix at zeros, 'lycoris' with the second one;
            False for random matrices.
    """

    rank_dropout: float = field(default=0.0)
    module_dropout: float = field(default=0.0)
    use_effective_conv2d: bool = field(default=False)
    decompose_both: bool = field(default=False)
    decompose_factor: int = field(default=-1)
    rank_dropout_scale: bool = field(default=False)
    init_weights: bool | str = field(default=True)

    method_type: ClassVar[str] = "LOKR"
    shares: ClassVar[tuple[str, ...]] = ("rank_dropout", "module_dropout")
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"init_weights": (True, False, "lycoris")}
    value_fields: ClassVar[tuple[str, ...]] = (
        *(*RankedConfig.value_fields, "rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ConfigError(
                f"decompose_factor must be a positive whole number or -1, not {self.decompose_factor}",
                field="decompose_factor",
            )


def two_factors(size: int, factor: int = -1) -> tuple[int, int]:
    """The two factors of a size, the smaller as close to a number as possible, as LyCORIS chooses them.

    Args:
        size: a number of features.
        factor: the first factor if it divides the size; else an upper bound of the smaller one. -1 for the two
            factors closest to each other.

    Returns:
        Two numbers, the smaller one first unless ``factor`` says otherwise.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    smaller = max(one for one in range(1, int(size**0.5) + 1) if size % one == 0 and (one <= most or one == 1))
    return smaller, size // smaller


@register(
    LoKrConfig,
    label="LoKr",
    listing=Listing(
        when="very small files; common for image models",
        paper="arXiv:2212.10650",
        summary=lambda config: {"r": str(config.r), "α": f"{config.alpha:g}"},
    ),
    default_targets=usual_targets,
    sample_configs={
        "whole": {"r": 8, "alpha": 4},
        "factored": {"r": 1, "decompose_both": True, "use_effective_conv2d": True},
        "flat": {"r": 1, "decompose_factor": 2},
    },
)
class LoKr(ScaledDelta, ConvertsToLora):
    """The two matrices, each whole or as factors, on one layer."""

    from_config: ClassVar[Mapping[str, str]] = {**ScaledDelta.from_config, "rescales_rows": "rank_dropout_scale"}
    identity: ClassVar[Mapping[str, float]] = {W1: 0.0, W1_A: 0.0}
    peft: ClassVar[PeftNames] = PeftNames(
        "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
        "r alpha scaling rank_dropout rank_dropout_scale module_dropout",
        attributes=ScaledDelta.peft.attributes,
    )

    @classmethod
    def parameter_shapes(cls, config: LoKrConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """W1 or its factors, and W2 or its factors, with a core where a convolution is taken apart."""
        check_takes_features("LoKr", path, kind)
        rank, (rows, columns, *kernel) = config.rank_at(path), kind.weight_shape(module)
        m, n = two_factors(columns, config.decompose_factor)
        l, k = two_factors(rows, config.decompose_factor)  # noqa: E741 - the names of the docstring
        small = config.decompose_both and rank < max(l, m) / 2
        shapes: Shapes = {W1_A: (l, rank), W1_B: (rank, m)} if small else {W1: (l, m)}
        if rank >= max(k, n) / 2:
            return {**shapes, W2: (k, n, *kernel)}
        if config.use_effective_conv2d and any(size != 1 for size in kernel):
            if len(kernel) > 2:
                raise ConfigError(f"{path}: use_effective_conv2d does not work in three dimensions", path=path)
            core = (rank, rank, *kernel, *[1] * (2 - len(kernel)))
            return {**shapes, W2_A: (rank, k), W2_B: (rank, n), T2: core}
        return {**shapes, W2_A: (k, rank), W2_B: (rank, n * math.prod(kernel))}

    @classmethod
    def initial_tensors(cls, config: LoKrConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        first, second = (W1, W1_A), (W2, W2_B)
        zeros = () if not config.init_weights else second if config.init_weights == "lycoris" else first
        zero = next((name for name in zeros if name in site.shapes), "")
        return {name: site.new(shape, None if name == zero else linear_) for name, shape in site.shapes.items()}

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``scaling (W1 ⊗ W2) x``."""
        drops = self.training and (self.rank_dropout or self.module_dropout)
        if drops or not base.kind.is_linear:
            return super().forward(x, base_output, base)
        if self.training:
            self.is_left_out()  # never, but the generator moves on
        dtype = compute_dtype(x, self.tensors[0])

        def product(x: Tensor, *parameters: Tensor) -> Tensor:
            held = {name: tensor.to(dtype) for name, tensor in zip(self._names, parameters, strict=True)}
            first = _first(held) * self.scaling
            hidden = x.to(dtype).reshape(-1, first.shape[1], x.shape[-1] // first.shape[1])
            hidden = hidden @ held[W2].T if W2 in held else hidden @ held[W2_B].T @ held[W2_A].T
            return (first @ hidden).reshape(*x.shape[:-1], -1)

        return keeping_inputs(product, x, *self.tensors)

    def unscaled_delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """The Kronecker product."""
        held = dict(zip(self._names, parameters, strict=True))
        first, second = _first(held), held.get(W2)
        if T2 in held:
            second = torch.einsum("ijkl,ip,jr->prkl", held[T2], held[W2_A], held[W2_B])
        elif second is None:
            second = held[W2_A] @ held[W2_B]
        shape = base.kind.weight_shape(base.module)
        if second.ndim == 3:  # PEFT pairs the dimensions of Conv1d otherwise, and so do its files
            return (first[:, None, :, None] * second[:, None, :, None, :]).reshape(shape)
        return _kron(first, second.flatten(1)).reshape(shape)

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta | None:
        """The Kronecker products of the first factors and of the second ones, if W2 has factors."""
        held = dict(zip(self._names, self.tensors, strict=True))
        if not base.kind.is_linear or W2 in held:
            return None
        if W1 in held:
            outer, inner = held[W1], torch.eye(held[W1].shape[1], device=base.device, dtype=held[W1].dtype)
        else:
            outer, inner = held[W1_A], held[W1_B]
        return LowRankDelta(_kron(inner, held[W2_B]), _kron(outer, held[W2_A]), float(self.scaling))


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product of two matrices; torch.kron fails on some strides of dimensions of size 1."""
    return torch.einsum("ij,kl->ikjl", first, second).flatten(2).flatten(0, 1)


def _first(held: Mapping[str, Tensor]) -> Tensor:
    """W1, (l, m)."""
    return held[W1] if W1 in held else held[W1_A] @ held[W1_B]
