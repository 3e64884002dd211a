"""MiSS: one block that is added to every group of a layer's inputs (Kang et al. 2024, arXiv:2409.15371).

    y = W x + Dᵀ Σ_g x_g        x_g: groups of r inputs, D: (r, out)

``init_weights="mini"`` repeats a smaller block along the outputs. ``"bat"`` multiplies the block by the weight
itself: with W in tiles of (r, r), Δ = W D + D, one block (r, r) for each row of tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_divides, check_linear, warn_of_unused
from nbpeft.engine.config.layers_config import TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import AdapterSite, ConvertsToLora, LowRankDelta
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import linear_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import WeightDelta
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.errors import ConfigError

BLOCK = "miss_block"


@dataclass
class MissConfig(TrainsBiases):
    """Config of MiSS. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: number of inputs in a group, which is the rank of the delta.
        miss_dropout: dropout probability of the adapter's input, from 0 to 1; not with 'bat'.
        mini_r: with init_weights='mini', number of outputs of the block, a divisor of each layer's outputs.
        init_weights: True starts at the base model, 'mini' and 'bat' too in their forms; False for a random block.
    """

    r: int = field(default=64)
    miss_dropout: float = field(default=0.0)
    mini_r: int = field(default=1)
    init_weights: bool | str = field(default=True)

    method_type: ClassVar[str] = "MISS"
    own_biases: ClassVar[str] = "MiSS_only"
    counts: ClassVar[tuple[str, ...]] = ("r", "mini_r")
    shares: ClassVar[tuple[str, ...]] = ("miss_dropout",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "init_weights": (True, False, "bat", "mini"),
    }
    value_fields: ClassVar[tuple[str, ...]] = ("miss_dropout",)

    def __post_init__(self) -> None:
        super().__post_init__()
        warn_of_unused(self, {"init_weights": "mini"}, "mini_r")


@register(
    MissConfig,
    label="MiSS",
    listing=Listing(
        when="about half of LoRA's parameters at the same rank, with the same memory",
        paper="arXiv:2409.15371",
        variant=lambda config: {"bat": "Bat", "mini": "MiSS mini"}.get(str(config.init_weights), ""),
    ),
    default_targets=usual_targets,
    sample_configs={
        "r4": {"r": 4},
        "uneven": {"r": 5},
        "mini": {"r": 4, "mini_r": 4, "init_weights": "mini"},
        "bat": {"r": 4, "init_weights": "bat"},
    },
)
class Miss(WeightDelta, ConvertsToLora):
    """The block of one layer."""

    peft: ClassVar[PeftNames] = PeftNames(
        "miss_block", "miss_r miss_dropout miss_mini_r", layer_prefix="Miss", attributes={"miss_r": "rank"}
    )
    from_config: ClassVar[Mapping[str, str]] = {"dropout": "miss_dropout"}

    dropout: float

    @classmethod
    def parameter_shapes(cls, config: MissConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The block: (r, out), with 'mini' (r, mini_r), with 'bat' (out / r, r, r)."""
        check_linear("MiSS", path, kind)
        rank, (in_features, out_features) = config.r, kind.features(module)
        if rank > in_features:
            raise ConfigError(f"{path}: r = {rank} is more than its {in_features} inputs; lower r", path=path)
        if config.init_weights == "mini":
            if out_features % config.mini_r:
                raise ConfigError(
                    f"{path}: mini_r = {config.mini_r} must divide its {out_features} outputs; choose another",
                    path=path,
                )
            return {BLOCK: (rank, config.mini_r)}
        if config.init_weights == "bat":
            check_divides("with init_weights='bat' r", rank, path, (in_features, out_features))
            return {BLOCK: (out_features // rank, rank, rank)}
        return {BLOCK: (rank, out_features)}

    @classmethod
    def _class_for(cls, config: MissConfig, site: AdapterSite) -> type[Miss]:
        return Bat if config.init_weights == "bat" else cls

    @classmethod
    def initial_tensors(cls, config: MissConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        return {BLOCK: site.new(site.shapes[BLOCK], None if config.init_weights else linear_)}

    @property
    def rank(self) -> int:
        """Inputs of a group."""
        return int(self.tensors[0].shape[-2])

    @property
    def delta_rank(self) -> int | None:
        return None if self.reads_weight else self.rank

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Sums the groups of inputs and multiplies them with the block."""
        block = self._whole_block(base)
        dtype = compute_dtype(x, block)
        missing = -x.shape[-1] % self.rank
        padded = F.pad(x, (0, missing)) if missing else x
        dropped = F.dropout(padded.to(dtype), self.dropout, self.training)
        sums = dropped.reshape(*dropped.shape[:-1], -1, self.rank).sum(-2)
        return sums @ block.to(dtype)

    def _whole_block(self, base: BaseLayer) -> Tensor:
        """D, (r, out)."""
        block = self.tensors[0]
        return block.repeat(1, base.out_features // block.shape[1]) if block.shape[1] < base.out_features else block

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        block = self._whole_block(base).T
        return block.repeat(1, -(-base.in_features // self.rank))[:, : base.in_features]

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta | None:
        block = self._whole_block(base)
        groups = -(-base.in_features // self.rank)
        sums = torch.eye(self.rank, device=block.device, dtype=block.dtype).repeat(1, groups)[:, : base.in_features]
        return LowRankDelta(sums, block.T, 1.0)


class Bat(Miss):
    """A block for each row of tiles of the weight, which is multiplied by the weight itself."""

    reads_weight: ClassVar[bool] = True

    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta | None:
        """None: the change of the weight has its full rank."""
        return None

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        return WeightDelta.forward(self, x, base_output, base)

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """``W D + D``."""
        return _on_tiles(base.weight(), *parameters)

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``W D + D``, of the given weight."""
        return _on_tiles(weight, self.tensors[0].detach())


def _on_tiles(weight: Tensor, block: Tensor) -> Tensor:
    """``W D + D`` (out, in), for D (out / r, r, r), in the dtype of D."""
    rank = block.shape[-1]
    rows, columns = weight.shape
    tiles = weight.to(block.dtype).reshape(rows // rank, rank, columns // rank, rank).permute(2, 0, 1, 3)
    return (tiles @ block + block).permute(1, 2, 0, 3).reshape(rows, columns)
