"""HRA: Householder reflections of a layer's input (Yuan et al. 2024, arXiv:2405.17484).

    y = W H x        H = (I - 2 u_1 u_1ᵀ) … (I - 2 u_r u_rᵀ), u: unit vectors, columns of (in, r)

The product of reflections is ``I - V C Vᵀ`` with a small triangular C (r, r), so ``H x`` costs two thin products,
and H is never built. With ``apply_GS`` the vectors are made orthogonal first, and C is twice the identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_takes_features, check_ungrouped
from nbpeft.engine.config.layers_config import TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, ConvertsToLora, LowRankDelta, TransformsInput
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import stored
from nbpeft.engine.contract.initial_draws import linear_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import apply_delta, keeping_inputs
from nbpeft.engine.kernels.numerics import widened
from nbpeft.errors import ConfigError

VECTORS = "hra_u"


@dataclass
class HRAConfig(TrainsBiases):
    """Config of HRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: number of reflections; an even one starts at the base model.
        apply_GS: make the vectors orthogonal to each other (Gram-Schmidt).
        init_weights: start with equal pairs of reflections, which undo each other; False for random vectors.
    """

    r: int = field(default=8)
    apply_GS: bool = field(default=False)
    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "HRA"
    counts: ClassVar[tuple[str, ...]] = ("r",)


@register(
    HRAConfig,
    label="HRA",
    listing=Listing(
        when="like OFT, with fewer parameters",
        paper="arXiv:2405.17484",
        smaller=lambda config: config.copy(r=config.r // 4 * 2) if config.r > 3 else None,
    ),
    default_targets=usual_targets,
    sample_configs={"r2": {"r": 2}, "r4": {"r": 4}},
)
class HRA(Adapter):
    """The vectors of one layer."""

    reads_weight: ClassVar[bool] = True
    peft: ClassVar[PeftNames] = PeftNames(
        "hra_u", "hra_r hra_apply_GS", layer_prefix="HRA", attributes={"hra_r": "rank", "hra_apply_GS": "orthogonal"}
    )
    from_config: ClassVar[Mapping[str, str]] = {"orthogonal": "apply_GS"}

    orthogonal: bool

    @classmethod
    def parameter_shapes(cls, config: HRAConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The vectors, (in, r), for a convolution (in * kernel, r)."""
        check_takes_features("HRA", path, kind)
        check_ungrouped("HRA", path, module)
        features = math.prod(kind.weight_shape(module)[1:])
        if config.apply_GS and config.r > features:
            raise ConfigError(
                f"{path}: r = {config.r} vectors cannot be orthogonal in {features} dimensions; lower r", path=path
            )
        return {VECTORS: (features, config.r)}

    @classmethod
    def _class_for(cls, config: HRAConfig, site: AdapterSite) -> type[HRA]:
        return HRAOnLinear if site.base.kind.is_linear else HRAOnConvolution

    @classmethod
    def initial_tensors(cls, config: HRAConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        """Pairs of equal vectors, whose reflections undo each other, or random vectors."""
        features, rank = site.shapes[VECTORS]
        if config.init_weights and rank % 2 == 0:
            return {VECTORS: site.new((features, rank // 2), linear_).repeat_interleave(2, dim=1)}
        return {VECTORS: site.new((features, rank), linear_)}

    vectors: Tensor = stored(VECTORS)  # u, (in, r), of any length

    @property
    def rank(self) -> int:
        """Number of reflections."""
        return int(self.vectors.shape[1])

    delta_rank = rank

    def change(self, rows: Tensor, vectors: Tensor, *, transposed: bool) -> Tensor:
        """The change of vectors by the reflections.

        Args:
            rows: (…, in).
            vectors: u, (in, r).
            transposed: whether to return the change of ``x Hᵀ``, for inputs, and not of ``w H``, for weights.
        """
        if self.orthogonal:
            basis = _basis(vectors)
            return rows @ basis @ basis.T * -2
        unit, core = _reflections(vectors)
        return rows @ unit @ (core.T if transposed else core) @ unit.T * -1

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``W H - W``, in the dtype of the vectors."""
        vectors = self.vectors.detach()
        rows = weight.to(vectors.dtype).flatten(1)
        return self.change(rows, vectors, transposed=False).view(weight.shape)

    def reset_(self, base: BaseLayer) -> None:
        """Overwrites every second vector with the one before it, which undoes the reflection."""
        vectors = self.get_parameter(VECTORS).detach()
        vectors[:, 1::2] = vectors[:, : vectors.shape[1] // 2 * 2 : 2]
        vectors[:, vectors.shape[1] // 2 * 2 :] = 0

    @classmethod
    def config_warnings(cls, config: HRAConfig, modules: Sequence[tuple[str, nn.Module, LayerKind]]) -> Iterable[str]:
        if config.init_weights and config.r % 2:
            yield f"with an odd r ({config.r}) HRA does not start at the base model: take an even one"


class HRAOnLinear(HRA, TransformsInput, ConvertsToLora):
    """Reflects the input."""

    def transform_input(self, x: Tensor, base: BaseLayer) -> Tensor:
        """``H x``, (…, in), in the dtype of ``x``."""
        return keeping_inputs(self._reflected, x, self.vectors)

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """``Vᵀ`` and ``-W V C``."""
        vectors = self.vectors
        weight = base.weight().to(vectors.dtype)
        if self.orthogonal:
            basis = _basis(vectors)
            return LowRankDelta(basis.T, weight @ basis, -2.0)
        unit, core = _reflections(vectors)
        return LowRankDelta(unit.T, weight @ unit @ core, -1.0)

    def _reflected(self, x: Tensor, vectors: Tensor) -> Tensor:
        rows = x.to(vectors.dtype)
        return (rows + self.change(rows, vectors, transposed=True)).to(x.dtype)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``W (H x - x)``."""
        vectors = self.vectors
        change = self.change(x.to(vectors.dtype), vectors, transposed=True)
        return base.kind.apply(base.module, change, base.weight().to(change.dtype))


class HRAOnConvolution(HRA):
    """Reflects the rows of the weight."""

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The convolution with ``W H - W``."""
        weight = base.weight()

        def delta(vectors: Tensor) -> Tensor:
            rows = weight.to(vectors.dtype).flatten(1)
            return self.change(rows, vectors, transposed=False).view(weight.shape)

        return apply_delta(x, base, delta, (self.vectors,))


def _reflections(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """V (in, r) and C (r, r) of ``H = I - V C Vᵀ``."""
    unit: Tensor = vectors / vectors.norm(dim=0).clamp_min(torch.finfo(vectors.dtype).tiny)
    products = widened(unit.T @ unit).triu(1)
    identity = torch.eye(unit.shape[1], device=unit.device, dtype=products.dtype)
    return unit, torch.linalg.solve_triangular(products + identity / 2, identity, upper=True).to(unit.dtype)


def _basis(vectors: Tensor) -> Tensor:
    """An orthonormal basis of them, (in, r)."""
    basis: Tensor = torch.linalg.qr(widened(vectors)).Q
    return basis.to(vectors.dtype)
