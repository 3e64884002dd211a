"""PSOFT: a rotation between the main directions of a weight (Wu et al. 2026, openreview FSHrinMArK).

    y = W x + s B (diag(b) Q diag(a) - I) A dropout(x)        Q: (r, r), orthogonal;  s B A: the rank-r part of W

A, (r, in), has orthonormal rows; it and B, (out, r), are frozen and not saved: they are recomputed from the weight
when an adapter is loaded. Singular vectors with other signs, from another implementation, give another adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.changes.random_numbers import drawing_from
from nbpeft.engine.config.config_checks import check_linear, warn_of_unused
from nbpeft.engine.config.layers_config import HasFanInFanOut
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, ConvertsToLora, LowRankDelta, Rescales
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import axis_size
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import FileFormat, Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import keeping_inputs
from nbpeft.engine.kernels.numerics import cayley, compute_dtype, neumann_cayley, widened
from nbpeft.errors import ConfigError

CORE, SCALE_A, SCALE_B = "psoft_R", "psoft_R_vector_a", "psoft_R_vector_b"
_KEYS = {CORE: f"{CORE}.weight", SCALE_A: f"{CORE}.vector_a", SCALE_B: f"{CORE}.vector_b"}
DOWN, UP = "psoft_A", "psoft_B"
_DEVIATION = 0.1
"""Standard deviation of a random core around the identity."""
_MOST_TERMS = 64
_MOST_ITERATIONS = 128
"""Each iteration costs two decompositions; after a few the subspace no longer changes."""


@dataclass
class PsoftConfig(HasFanInFanOut):
    """Config of PSOFT. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: how many singular directions are rotated.
        psoft_alpha: B is divided by alpha / r, and the delta is multiplied by it.
        psoft_dropout: dropout probability of the adapter's input, from 0 to 1.
        ab_svd_init: "psoft_init" puts the singular values into B, "pissa_init" their square roots into A and B.
        psoft_svd: "full", or "lowrank" for a randomized SVD, which is faster.
        psoft_svd_lowrank_niter: iterations of the randomized SVD; at most 128.
        random_seed: seed of the randomized SVD.
        psoft_orth: whether the trained matrix is a rotation; False for any matrix.
        psoft_mag_b: train a factor on each output of the rotation.
        psoft_mag_a: train a factor on each input of the rotation.
        use_cayley_neumann: approximate the Cayley transform by a series: faster, and not exactly orthogonal.
        num_cayley_neumann_terms: number of its terms.
        cayley_neumann_eps: largest norm of the matrix in a Neumann series; None for no limit.
        init_weights: start at the base model; False for a random core.
    """

    r: int = field(default=32)
    psoft_alpha: float = field(default=32)
    psoft_dropout: float = field(default=0.0)
    ab_svd_init: str = field(default="psoft_init")
    psoft_svd: str = field(default="full")
    psoft_svd_lowrank_niter: int = field(default=10)
    random_seed: int = field(default=0)
    psoft_orth: bool = field(default=True)
    psoft_mag_b: bool = field(default=True)
    psoft_mag_a: bool = field(default=True)
    use_cayley_neumann: bool = field(default=False)
    num_cayley_neumann_terms: int = field(default=5)
    cayley_neumann_eps: float | None = field(default=None)
    init_weights: bool = field(default=True)

    positive: ClassVar[tuple[str, ...]] = ("psoft_alpha",)
    method_type: ClassVar[str] = "PSOFT"
    counts: ClassVar[tuple[str, ...]] = ("r", "psoft_svd_lowrank_niter")
    shares: ClassVar[tuple[str, ...]] = ("psoft_dropout",)
    seeds: ClassVar[tuple[str, ...]] = ("random_seed",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "ab_svd_init": ("psoft_init", "pissa_init"),
        "psoft_svd": ("full", "lowrank"),
    }
    value_fields: ClassVar[tuple[str, ...]] = (
        *("psoft_dropout", "use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps", "init_weights"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("psoft_svd_lowrank_niter", _MOST_ITERATIONS), ("num_cayley_neumann_terms", _MOST_TERMS)):
            if not 0 < getattr(self, name) <= most:
                raise ConfigError(f"{name} must be from 1 to {most}, not {getattr(self, name):.3g}", field=name)
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ConfigError(
                f"cayley_neumann_eps must be between 0 and 1, not {self.cayley_neumann_eps:g}",
                field="cayley_neumann_eps",
            )
        warn_of_unused(self, {"use_cayley_neumann": True}, "num_cayley_neumann_terms", "cayley_neumann_eps")
        warn_of_unused(self, {"psoft_svd": "lowrank"}, "psoft_svd_lowrank_niter")

    @property
    def initialised_from_weight(self) -> bool:
        """Always: the directions are computed from the weight."""
        return True

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return float(self.psoft_alpha) / self.r

    @property
    def terms(self) -> int | None:
        """Number of terms of the series that approximates the inverse; None for the exact inverse."""
        return self.num_cayley_neumann_terms if self.use_cayley_neumann else None


@register(
    PsoftConfig,
    label="PSOFT",
    listing=Listing(
        when="like OFT, with few parameters: rotates only a weight's main directions",
        paper="https://openreview.net/forum?id=FSHrinMArK",
    ),
    default_targets=usual_targets,
    sample_configs={
        "r4": {"r": 4, "psoft_alpha": 8},
        "series": {
            **{"r": 3, "use_cayley_neumann": True, "cayley_neumann_eps": 0.2, "psoft_mag_a": False},
            **{"ab_svd_init": "pissa_init", "psoft_svd": "lowrank"},
        },
        "free": {"r": 3, "psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False},
    },
    files=FileFormat(keys=_KEYS),
)
class Psoft(Adapter, ConvertsToLora, Rescales):
    """The trained parameters between the directions of one layer."""

    peft: ClassVar[PeftNames] = PeftNames(
        "psoft_R",
        "r psoft_alpha scaling psoft_dropout psoft_svd psoft_svd_lowrank_niter random_seed ab_svd_init "
        "_psoft_A_cache _psoft_B_cache",
        grouped=_KEYS,
        attributes={"r": "rank", "psoft_alpha": "alpha"},
    )
    from_config: ClassVar[Mapping[str, str]] = {
        "scaling": "scaling",
        "alpha": "psoft_alpha",
        "dropout": "psoft_dropout",
        "terms": "terms",
        "eps": "cayley_neumann_eps",
    }

    alpha: float
    dropout: float
    terms: int | None
    eps: float | None

    @classmethod
    def parameter_shapes(cls, config: PsoftConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The core, the r (r - 1) / 2 numbers of a rotation or (r, r), and the factors, (r,)."""
        check_linear("PSOFT", path, kind)
        rank, largest = config.r, min(kind.features(module))
        if rank > largest:
            raise ConfigError(f"{path}: r = {rank} is more than the {largest} directions of its weight", path=path)
        shapes: Shapes = {CORE: (rank * (rank - 1) // 2,) if config.psoft_orth else (rank, rank)}
        wanted = {SCALE_B: config.psoft_mag_b, SCALE_A: config.psoft_mag_a}
        return {**shapes, **{name: (rank,) for name, is_wanted in wanted.items() if is_wanted}}

    @classmethod
    def initial_tensors(cls, config: PsoftConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        """The identity, or random tensors around it."""
        options: Any = {"device": site.base.device, "dtype": site.dtype}
        tensors = {name: torch.ones(shape, **options) for name, shape in site.shapes.items()}
        normal = None if config.init_weights else normal_
        if config.psoft_orth:
            tensors[CORE] = site.new(site.shapes[CORE], normal and partial(normal, std=_DEVIATION))
        else:
            core = site.new(site.shapes[CORE], normal) * _DEVIATION
            tensors[CORE] = core + torch.eye(config.r, **options)
        return tensors

    def prepare(self, config: PsoftConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        for name, found in zip((DOWN, UP), _directions(config, site.base), strict=True):
            self.register_buffer(name, found, persistent=False)

    rank: int = axis_size(DOWN)  # Number of directions
    delta_rank = rank

    def change(self) -> Tensor:
        """``diag(b) Q diag(a) - I``, (r, r), in the dtype of the trained parameters."""
        names = [name for name in (CORE, SCALE_B, SCALE_A) if self.tensor(name, optional=True) is not None]

        def made(*given: Tensor) -> Tensor:
            held = dict(zip(names, given, strict=True))
            core = held[CORE] if held[CORE].ndim == 2 else self._rotation(held[CORE])
            if SCALE_B in held:
                core = held[SCALE_B][:, None] * core
            if SCALE_A in held:
                core = core * held[SCALE_A]
            return core - torch.eye(self.rank, device=core.device, dtype=core.dtype)

        return keeping_inputs(made, *(self.tensor(name) for name in names))

    def _rotation(self, triangle: Tensor) -> Tensor:
        """Q: the Cayley transform of a skew-symmetric matrix, from the numbers above its diagonal."""
        rows, columns = torch.triu_indices(self.rank, self.rank, 1, device=triangle.device)
        skew = triangle.new_zeros(self.rank, self.rank).index_put((rows, columns), triangle)
        skew = skew - skew.T
        if self.terms is None:
            return cayley(-skew)
        if self.eps is not None:
            norm = torch.linalg.matrix_norm(skew)
            skew = skew * torch.where(norm > self.eps, self.eps / (norm + 1e-12), torch.ones_like(norm))
        return neumann_cayley(skew, self.terms)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``s B (diag(b) Q diag(a) - I) A dropout(x)``."""
        change = self.change()
        dtype = compute_dtype(x, change)
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        hidden = F.linear(F.linear(dropped, self.tensor(DOWN).to(dtype)), change.to(dtype))
        return F.linear(hidden * self.scaling, self.tensor(UP).to(dtype))

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """A and ``B (diag(b) Q diag(a) - I)``."""
        down, up = self.tensor(DOWN), self.tensor(UP)
        return LowRankDelta(down, up @ self.change().to(up.dtype), float(self.scaling))

    def reset_(self, base: BaseLayer) -> None:
        """Resets the parameters to the identity."""
        for name, parameter in self.named_parameters():
            held = parameter.detach()
            if name != CORE:
                held.fill_(1)
            elif held.ndim == 2:
                nn.init.eye_(held)
            else:
                held.zero_()


def _directions(config: PsoftConfig, base: BaseLayer) -> tuple[Tensor, Tensor]:
    """A, (r, in), and B, (out, r), in float32 at least, so that s B A is the rank-r part of the weight."""
    weight, rank = widened(base.weight()), config.r
    if config.psoft_svd == "full":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        with drawing_from(config.random_seed):
            left, values, columns = torch.svd_lowrank(weight, q=rank, niter=config.psoft_svd_lowrank_niter)
        right = columns.T
    left, values, right = left[:, :rank], values[:rank] / config.scaling, right[:rank]
    if config.ab_svd_init == "psoft_init":
        return right.contiguous(), (left * values).contiguous()
    return (values.sqrt()[:, None] * right).contiguous(), (left * values.sqrt()).contiguous()
