"""DEFT: replaces a component of the weight by new content (NeurIPS 2025); PaRa: only removes the component.

    y = (I - Q Nᵀ) W x + s Q R dropout(x)        P: (out, r), R: (r, in), trained
    relu: Q = P, N = relu(P)        qr: Q = N = the orthonormal columns of P

At the start s R = Nᵀ W, so the injected component is the removed one. With ``para`` there is no R. The component is
removed from the output of the frozen layer: if that layer rounds its input or output (8 bit, half precision), training
starts at the base model up to the rounding error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.config.layers_config import HasFanInFanOut, TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, ConvertsToLora, HotSwaps, LowRankDelta
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shape, Shapes
from nbpeft.engine.contract.bindable import axis_size
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import compute_dtype, widened

DIRECTIONS, INJECTION = "deft_P", "deft_R"
_DEVIATION = 0.02
"""Standard deviation of new directions, and of a random injection."""


@dataclass
class DeftConfig(HasFanInFanOut, TrainsBiases):
    """Config of DEFT. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: how many directions of the output are taken out and put in.
        decomposition_method: "relu", or "qr" for an orthogonal projection.
        init_scale: with init_weights=False, the injection starts with a deviation of 0.02 times this.
        alpha: the injection is multiplied by alpha / r; None for 1.
        para: take directions out alone, which cannot start at the base model.
        deft_dropout: share of the injection's inputs that are dropped in training, from 0 to 1.
        init_weights: start at the base model; False for a random injection.
    """

    r: int = field(default=8)
    decomposition_method: str = field(default="relu")
    init_scale: float = field(default=1.0)
    alpha: float | None = field(default=None)
    para: bool = field(default=False)
    deft_dropout: float = field(default=0.0)
    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "DEFT"
    counts: ClassVar[tuple[str, ...]] = ("r",)
    shares: ClassVar[tuple[str, ...]] = ("deft_dropout",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"decomposition_method": ("relu", "qr")}
    value_fields: ClassVar[tuple[str, ...]] = (
        *("decomposition_method", "init_scale", "alpha", "deft_dropout", "init_weights"),
    )


@register(
    DeftConfig,
    label="DEFT",
    listing=Listing(
        when="replacing content of an image model: a subject or a style",
        paper="https://proceedings.neurips.cc/paper_files/paper/2025/hash/93a34a7138bdad95e874018d5f491cc6-Abstract-Conference.html",
        variant=lambda config: "PaRa" if config.para else "",
        summary=lambda config: {"r": str(config.r), "by": config.decomposition_method},
    ),
    default_targets=usual_targets,
    sample_configs={
        "relu": {"r": 4, "alpha": 8},
        "qr": {"r": 3, "decomposition_method": "qr"},
    },
)
class Deft(Adapter, ConvertsToLora, HotSwaps):
    """The directions of one layer, and the values that are added to them."""

    reads_weight: ClassVar[bool] = True
    peft: ClassVar[PeftNames] = PeftNames(
        "deft_P deft_R",
        "deft_r deft_decomposition deft_init_scale deft_para deft_scaling deft_dropout _cached_merge_factor",
        layer_prefix="Deft",
        attributes={
            "deft_r": "rank",
            "deft_decomposition": "decomposition",
            "deft_para": "only_removes",
            "deft_scaling": "factor",
        },
    )
    from_config: ClassVar[Mapping[str, str]] = {"decomposition": "decomposition_method", "dropout": "deft_dropout"}

    decomposition: str
    factor: float
    dropout: float

    @classmethod
    def parameter_shapes(cls, config: DeftConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """P, (out, r), and, but for PaRa, R, (r, in), with r at most out."""
        check_linear("DEFT", path, kind)
        in_features, out_features = kind.features(module)
        rank = min(config.r, out_features)
        shapes: Shapes = {DIRECTIONS: (out_features, rank)}
        return shapes if config.para else {**shapes, INJECTION: (rank, in_features)}

    @classmethod
    def initial_tensors(cls, config: DeftConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        """Random directions, and an injection that undoes them, or a random one."""
        normal = partial(normal_, std=_DEVIATION)
        directions = site.new(site.shapes[DIRECTIONS], normal)
        if config.para:
            return {DIRECTIONS: directions}
        if not config.init_weights:
            return {DIRECTIONS: directions, INJECTION: site.new(site.shapes[INJECTION], normal) * config.init_scale}
        _, reader = _projection(directions, config.decomposition_method)
        factor = _factor(config.alpha, directions.shape[1])
        return {DIRECTIONS: directions, INJECTION: _taken_out(reader, site.base, factor).to(site.dtype)}

    rank: int = axis_size(DIRECTIONS, 1)  # Number of directions
    delta_rank = rank

    @property
    def only_removes(self) -> bool:
        """Whether nothing is added."""
        return self.tensor(INJECTION, optional=True) is None

    def prepare(self, config: DeftConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        self.bind(factor=_factor(config.alpha, self.rank))

    def configure(self, config: DeftConfig, path: str) -> None:
        self.bind(factor=_factor(config.alpha, self.rank))

    def keep_settings(self, change: Transaction) -> None:
        change.keep_attributes(self, "factor")

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``Q (s R dropout(x) - Nᵀ W x)``."""
        directions, reader = _projection(self.tensor(DIRECTIONS), self.decomposition)
        dtype = compute_dtype(x, directions)
        product = base_output.to(dtype)
        product = product if base.bias is None else product - base.bias.to(product)
        change = -(product @ reader.to(dtype))
        if not self.only_removes:
            dropped = F.dropout(x.to(dtype), self.dropout, self.training)
            change = change + F.linear(dropped, self.tensor(INJECTION).to(dtype) * self.factor)
        return F.linear(change, directions.to(dtype))

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The values that are added minus those that are removed, (r, in), and Q, (out, r), detached."""
        directions, reader = _projection(self.tensor(DIRECTIONS).detach(), self.decomposition)
        rows = -(reader.T @ weight.to(directions.dtype))
        if not self.only_removes:
            rows = rows + self.tensor(INJECTION).detach().to(rows) * self.factor
        return rows, directions

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``Q (s R - Nᵀ W)``, of the given weight."""
        rows, directions = self._factors(weight)
        return directions @ rows

    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """``s R - Nᵀ W`` and Q."""
        return LowRankDelta(*self._factors(base.weight()), 1.0)

    @classmethod
    def size_of(cls, shapes: Mapping[str, Shape]) -> int | None:
        return shapes[DIRECTIONS][1]

    def swap_refusal(self) -> str:
        """Why a layer without the other adapter cannot stay unchanged."""
        removes = self.only_removes and self.decomposition == "qr"
        return "takes directions out of every layer, whatever its tensors are" if removes else ""

    @torch.no_grad()
    def reset_(self, base: BaseLayer) -> None:
        """Resets the adapter so that it adds exactly what its directions remove."""
        directions = self.get_parameter(DIRECTIONS)
        directions.zero_()
        if not self.only_removes:
            _, reader = _projection(directions, self.decomposition)
            self.get_parameter(INJECTION).copy_(_taken_out(reader, base, self.factor))


def _projection(directions: Tensor, decomposition: str) -> tuple[Tensor, Tensor]:
    """Q and N, (out, r), in float32 at least."""
    wide = widened(directions)
    if decomposition == "relu":
        return wide, wide.relu()
    basis: Tensor = torch.linalg.qr(wide).Q
    return basis, basis


def _factor(alpha: float | None, rank: int) -> float:
    """s: α / r, or 1 without α."""
    return alpha / rank if alpha else 1.0


def _taken_out(reader: Tensor, base: BaseLayer, factor: float) -> Tensor:
    """``Nᵀ W / s``, (r, in), in the dtype of N."""
    return reader.T @ base.weight().to(reader.dtype) / factor
