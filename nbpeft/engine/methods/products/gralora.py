"""GraLoRA: a low-rank product for each block of a weight (Jung et al. 2025, arXiv:2505.20355).

    Δ: (out, in) in k times k blocks, that of outputs j and inputs n: α / r B_jn A_nj, of rank r / k

With as many parameters as LoRA of rank r, Δ has a rank of up to k r. ``hybrid_r`` adds a LoRA of the whole weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_divides, check_linear
from nbpeft.engine.config.layers_config import HasFanInFanOut, TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import AdapterSite, Rescales
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import Fill, linear_, skip_linear
from nbpeft.engine.contract.method_records import FileFormat, Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import WeightDelta, keeping_inputs
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.errors import ConfigError

BLOCKS_A, BLOCKS_B = "gralora_A", "gralora_B"
WHOLE_A, WHOLE_B = "gralora_A_general", "gralora_B_general"


@dataclass
class GraloraConfig(HasFanInFanOut, TrainsBiases):
    """Config of GraLoRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: rank of all blocks of a row together; the size of the adapter is that of a LoRA of this rank.
        hybrid_r: rank of an additional LoRA of the whole weight; 0 for none.
        alpha: the delta is multiplied by alpha / (r + hybrid_r).
        gralora_dropout: dropout probability of the adapter's input, from 0 to 1.
        gralora_k: number of blocks along each side, which divides r and the inputs and outputs of each layer.
        init_weights: start at the base model; False for random factors.
    """

    r: int = field(default=32)
    hybrid_r: int = field(default=0)
    alpha: float = field(default=64)
    gralora_dropout: float = field(default=0.0)
    gralora_k: int = field(default=2)
    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "GRALORA"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    counts: ClassVar[tuple[str, ...]] = ("r", "gralora_k")
    shares: ClassVar[tuple[str, ...]] = ("gralora_dropout",)
    value_fields: ClassVar[tuple[str, ...]] = ("alpha", "gralora_dropout", "init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hybrid_r < 0:
            raise ConfigError(f"hybrid_r must be a whole number of at least 0, not {self.hybrid_r}", field="hybrid_r")
        if self.r % self.gralora_k:
            raise ConfigError(f"gralora_k = {self.gralora_k} must divide r = {self.r}", field="gralora_k")

    @property
    def scaling(self) -> float:
        """alpha / (r + hybrid_r)."""
        return self.alpha / (self.r + self.hybrid_r)


def _smaller(config: GraloraConfig) -> GraloraConfig | None:
    rank = config.r // 2 // config.gralora_k * config.gralora_k
    return config.copy(r=rank, hybrid_r=config.hybrid_r // 2) if rank else None


@register(
    GraloraConfig,
    label="GraLoRA",
    listing=Listing(
        when="a higher rank than LoRA with the same number of parameters",
        paper="arXiv:2505.20355",
        summary=lambda config: {"r": str(config.r), "k": str(config.gralora_k), "α": f"{config.alpha:g}"},
        smaller=_smaller,
    ),
    default_targets=usual_targets,
    sample_configs={"k2": {"r": 4}, "hybrid": {"r": 4, "gralora_k": 4, "hybrid_r": 2, "alpha": 8}},
    files=FileFormat(keys={name: f"{name}.weight" for name in (WHOLE_A, WHOLE_B)}),
)
class Gralora(WeightDelta, Rescales):
    """The factors of one layer: A, (k, in / k, r), B, (k, r, out / k), and factors of the whole weight, if any."""

    peft: ClassVar[PeftNames] = PeftNames(
        "gralora_A gralora_B gralora_A_general gralora_B_general",
        "r hybrid_r alpha scaling gralora_dropout gralora_k",
        wrapped=(WHOLE_A, WHOLE_B),
        attributes={name: name for name in ("r", "hybrid_r", "alpha", "gralora_k")} | {"r": "rank"},
    )
    from_config: ClassVar[Mapping[str, str]] = {"scaling": "scaling", "alpha": "alpha", "dropout": "gralora_dropout"}

    alpha: float
    dropout: float

    @classmethod
    def parameter_shapes(cls, config: GraloraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The factors."""
        check_linear("GraLoRA", path, kind)
        count, (inputs, outputs) = config.gralora_k, kind.features(module)
        check_divides("gralora_k", count, path, (inputs, outputs))
        shapes: Shapes = {
            BLOCKS_A: (count, inputs // count, config.r),
            BLOCKS_B: (count, config.r, outputs // count),
        }
        whole = {WHOLE_A: (config.hybrid_r, inputs), WHOLE_B: (outputs, config.hybrid_r)}
        return shapes | (whole if config.hybrid_r else {})

    @classmethod
    def initial_tensors(cls, config: GraloraConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        """Factors drawn block by block; those that are multiplied last are zeros."""
        of_blocks: Fill = linear_
        fills: dict[str, Fill | None] = {BLOCKS_A: of_blocks, BLOCKS_B: of_blocks, WHOLE_A: linear_, WHOLE_B: linear_}
        if config.init_weights:
            fills |= {BLOCKS_B: None, WHOLE_B: None}
        names = BLOCKS_A, BLOCKS_B
        pairs = zip(*([site.shapes[name][:0:-1]] * site.shapes[name][0] for name in names), strict=True)
        blocks = [[site.new(shape, fills[name]).T for name, shape in zip(names, pair, strict=True)] for pair in pairs]
        made = {name: torch.stack(parts) for name, parts in zip(names, zip(*blocks, strict=True), strict=True)}
        whole = {name: shape for name, shape in site.shapes.items() if name not in made}
        skip_linear(site.device, *whole.values())
        return made | {name: site.new(shape, fills[name]) for name, shape in whole.items()}

    @property
    def rank(self) -> int:
        """Rank of all blocks of a row together."""
        return int(self.tensors[0].shape[2])

    @property
    def gralora_k(self) -> int:
        """Number of blocks along each side."""
        return int(self.tensors[0].shape[0])

    @property
    def hybrid_r(self) -> int:
        """Rank of the LoRA of the whole weight."""
        _, _, *whole = self.tensors
        return len(whole[0]) if whole else 0

    @property
    def delta_rank(self) -> int | None:
        return self.gralora_k * self.rank + self.hybrid_r

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The products of the blocks, summed."""
        dropped = F.dropout(x, self.dropout, self.training)
        first, second, *whole = self.tensors
        if not (whole and self.dropout and self.training):
            return keeping_inputs(_product, dropped, *self.tensors, keeps_little=True) * self.scaling
        found = keeping_inputs(_product, dropped, first, second, keeps_little=True)
        dropped = F.dropout(x, self.dropout).to(found.dtype)  # other inputs than of the blocks
        whole_A, whole_B = (factor.to(found.dtype) for factor in whole)
        return (found + F.linear(F.linear(dropped, whole_A), whole_B)) * self.scaling

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """The blocks, and the product of the whole weight."""
        first, second, *whole = parameters
        count, inputs, rank = first.shape
        left, right = first.view(count, inputs, count, -1), second.view(count, count, rank // count, -1)
        delta = torch.einsum("nijs,jnso->joni", left, right).reshape(-1, count * inputs)
        if whole:
            delta = delta + whole[1] @ whole[0]
        return delta * self.scaling

    def reset_(self, base: BaseLayer) -> None:
        for tensor in self.tensors[1::2]:  # B, and that of the whole weight
            tensor.detach().zero_()


def _product(x: Tensor, first: Tensor, second: Tensor, *whole: Tensor) -> Tensor:
    """The product of an input (…, in) with all blocks, (…, out), without the scaling."""
    dtype = compute_dtype(x, first)
    x, first, second = x.to(dtype), first.to(dtype), second.to(dtype)
    count = first.shape[0]
    parts = torch.einsum("...ni,nir->...nr", x.reshape(*x.shape[:-1], count, -1), first)
    exchanged = parts.reshape(*parts.shape[:-1], count, -1).transpose(-3, -2).flatten(-2)
    found = torch.einsum("...jr,jro->...jo", exchanged, second).flatten(-2)
    return found + F.linear(F.linear(x, whole[0].to(dtype)), whole[1].to(dtype)) if whole else found
