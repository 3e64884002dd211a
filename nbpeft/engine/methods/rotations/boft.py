"""BOFT: orthogonal butterflies on a layer's input, and a scale of each output (Liu et al. 2023, arXiv:2311.06243).

    y = s ∘ W M x        M = B_m … B_1, B_i = P_i diag(R_i1, R_i2, …) P_iᵀ

R_ij are rotations of b inputs, each the Cayley transform of the skew-symmetric part of a trained matrix, and P_i mixes
blocks of 2^(i-1) b inputs: with m factors a rotation reaches over 2^(m-1) blocks. P is never built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_count, check_linear_or_conv2d
from nbpeft.engine.config.layers_config import HasFanInFanOut, TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, TransformsInput, TransformsOutput
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import stored
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import apply_delta, keeping_inputs
from nbpeft.engine.kernels.numerics import cayley
from nbpeft.errors import ConfigError

ROTATION, SCALE = "boft_R", "boft_s"
_MEANS = {ROTATION: 0.0, SCALE: 1.0}


@dataclass
class BOFTConfig(HasFanInFanOut, TrainsBiases):
    """Config of BOFT. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        boft_block_size: number of inputs of a block, a divisor of each layer's inputs; 0 with boft_block_num.
        boft_block_num: number of blocks of a layer; 0 with boft_block_size.
        boft_n_butterfly_factor: number of factors; with more than one, blocks are mixed. PEFT takes 1 on a CPU.
        boft_dropout: share of the blocks of one factor that are not rotated in a call of the training, from 0 to 1.
        init_weights: start at the base model; False for random numbers.
    """

    boft_block_size: int = field(default=4)
    boft_block_num: int = field(default=0)
    boft_n_butterfly_factor: int = field(default=1)
    boft_dropout: float = field(default=0.0)
    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "BOFT"
    counts: ClassVar[tuple[str, ...]] = ("boft_n_butterfly_factor",)
    shares: ClassVar[tuple[str, ...]] = ("boft_dropout",)
    value_fields: ClassVar[tuple[str, ...]] = ("boft_dropout", "init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ConfigError(
                f"give either boft_block_size or boft_block_num, and 0 for the other, not {self.boft_block_size:.3g} "
                f"and {self.boft_block_num:.3g}",
                field="boft_block_size",
            )
        given = "boft_block_size" if self.boft_block_size else "boft_block_num"
        check_count(given, getattr(self, given))

    def blocks_of(self, path: str, features: int) -> tuple[int, int]:
        """The number and the size of the blocks of a layer with so many inputs.

        Raises:
            ConfigError: they do not divide the inputs, or do not suit the number of factors.
        """
        given = "boft_block_size" if self.boft_block_size else "boft_block_num"
        wanted = getattr(self, given)
        if features % wanted:
            raise ConfigError(f"{path}: {given} = {wanted} must divide its {features} inputs", path=path)
        count, size = (features // wanted, wanted) if self.boft_block_size else (wanted, features // wanted)
        factors = self.boft_n_butterfly_factor
        if factors > 1 and (size % 2 or factors > _LARGEST_EXPONENT or count % 2 ** (factors - 1)):
            raise ConfigError(
                f"{path}: boft_n_butterfly_factor = {factors} needs blocks of an even size whose number is a multiple "
                f"of 2 ** {factors - 1}, not {count} of {size}; choose another",
                path=path,
            )
        return count, size


_LARGEST_EXPONENT = 24


@register(
    BOFTConfig,
    label="BOFT",
    listing=Listing(
        when="like OFT, but every input can be rotated against every other one",
        paper="arXiv:2311.06243",
        summary=lambda config: (
            {"block": str(config.boft_block_size)} if config.boft_block_size else {"blocks": str(config.boft_block_num)}
        ),
        smaller=lambda config: (
            config.copy(boft_block_size=config.boft_block_size // 2) if config.boft_block_size > 3 else None
        ),
    ),
    default_targets=usual_targets,
    sample_configs={
        "b4": {"boft_block_size": 4},
        "blocks": {"boft_block_size": 0, "boft_block_num": 2},
    },
)
class BOFT(Adapter):
    """The matrices, (factors, blocks, b, b), and the scales, (out, 1), of one layer.

    Attributes:
        dropout: share of the blocks of one factor that are not rotated in training.
    """

    reads_weight: ClassVar[bool] = True
    peft: ClassVar[PeftNames] = PeftNames(
        "boft_R boft_s",
        "boft_block_size boft_block_num boft_dropout",
        attributes={"boft_block_size": "size", "boft_block_num": "count"},
    )
    from_config: ClassVar[Mapping[str, str]] = {"dropout": "boft_dropout"}
    identity: ClassVar[Mapping[str, float]] = _MEANS

    dropout: float

    @classmethod
    def parameter_shapes(cls, config: BOFTConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The matrices and the scales, which are (1, out) for a convolution."""
        check_linear_or_conv2d("BOFT", path, module, kind)
        rows, *others = kind.weight_shape(module)
        count, size = config.blocks_of(path, math.prod(others))
        matrices = (config.boft_n_butterfly_factor, count, size, size)
        return {ROTATION: matrices, SCALE: (rows, 1) if kind.is_linear else (1, rows)}

    @classmethod
    def _class_for(cls, config: BOFTConfig, site: AdapterSite) -> type[BOFT]:
        return BOFTOnLinear if site.base.kind.is_linear else BOFTOnConvolution

    @classmethod
    def initial_tensors(cls, config: BOFTConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        if config.init_weights:
            return {name: site.new(site.shapes[name]) + mean for name, mean in _MEANS.items()}
        return {
            name: site.new(site.shapes[name], partial(normal_, std=0.1, mean=mean)) for name, mean in _MEANS.items()
        }

    matrices: Tensor = stored(ROTATION)  # The parameters of the rotations, (factors, blocks, b, b)

    @property
    def scale(self) -> Tensor:
        """s, (out,)."""
        found: Tensor = self.tensor(SCALE)
        return found.flatten()

    @property
    def count(self) -> int:
        """Number of blocks."""
        return int(self.matrices.shape[1])

    @property
    def size(self) -> int:
        """Inputs of a block."""
        return int(self.matrices.shape[2])

    def _kept(self) -> Tensor | None:
        """Which blocks are rotated in this call of a training, (factors, blocks, 1, 1); None for all."""
        if not (self.training and self.dropout):
            return None
        kept = torch.ones(*self.matrices.shape[:2], 1, 1, dtype=torch.bool)
        factor, places = int(torch.randint(0, kept.shape[0], (1,))), torch.randperm(self.count)
        dropped = int(self.dropout * self.count)
        kept[factor] = (places >= dropped).view(-1, 1, 1)
        return kept.to(self.matrices.device) if dropped else None

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``s ∘ W M - W``, in the dtype of the matrices."""
        return _change_of_weight(weight, self.matrices.detach(), self.scale.detach(), None)


class BOFTOnLinear(BOFT, TransformsInput, TransformsOutput):
    """Rotates the input and scales the output."""

    def transform_input(self, x: Tensor, base: BaseLayer) -> Tensor:
        """``M x``, (…, in), in the dtype of ``x``."""
        kept = self._kept()
        return keeping_inputs(lambda x, matrices: _rotated(x, matrices, kept).to(x.dtype), x, self.matrices)

    def transform_output(self, output: Tensor, base: BaseLayer) -> Tensor:
        """``s ∘ y``, (…, out), without the bias, in the dtype of ``y``."""
        scale, bias = self.scale, base.bias
        if bias is None:
            return (output * scale).to(output.dtype)
        return (output * scale + bias * (1 - scale)).to(output.dtype)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``s ∘ W M x - W x``."""
        kept = self._kept()
        rotated = keeping_inputs(lambda x, matrices: _rotated(x, matrices, kept), x, self.matrices)
        weight = base.weight().to(rotated.dtype)
        scaled = base.kind.apply(base.module, rotated, weight) * self.scale.to(rotated.dtype)
        return scaled - base.kind.apply(base.module, x.to(rotated.dtype), weight)


class BOFTOnConvolution(BOFT):
    """Rotates and scales the rows of the weight."""

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The convolution with ``s ∘ W M - W``."""
        weight, kept = base.weight(), self._kept()
        return apply_delta(
            x,
            base,
            lambda matrices, scale: _change_of_weight(weight, matrices, scale, kept),
            (self.matrices, self.scale),
        )


def _change_of_weight(weight: Tensor, matrices: Tensor, scale: Tensor, kept: Tensor | None) -> Tensor:
    """``s ∘ W M - W``, shaped like the weight."""
    rows = weight.to(matrices.dtype).flatten(1)
    return (_rotated(rows, matrices, kept, transposed=True) * scale[:, None] - rows).view(weight.shape)


def _rotated(rows: Tensor, matrices: Tensor, kept: Tensor | None, *, transposed: bool = False) -> Tensor:
    """Vectors times M, in the dtype of the matrices.

    Args:
        rows: (…, features).
        matrices: (factors, blocks, b, b).
        kept: (factors, blocks, 1, 1), False for blocks that are not rotated; None for all.
        transposed: with the transposed M, as a weight is.
    """
    rotations = cayley((matrices - matrices.mT) / 2)
    if kept is not None:
        rotations = torch.where(kept, rotations, torch.eye(matrices.shape[-1]).to(rotations))
    order = range(len(rotations)) if transposed else reversed(range(len(rotations)))
    rows = rows.to(rotations.dtype)
    for factor in order:
        blocks = rotations[factor].mT if transposed else rotations[factor]
        parts = _unmixed(rows, blocks.shape[-1], factor).reshape(*rows.shape[:-1], *blocks.shape[:2])
        rows = _mixed(torch.einsum("...rk,rkc->...rc", parts, blocks).flatten(-2), blocks.shape[-1], factor)
    return rows


def _mixed(rows: Tensor, size: int, factor: int) -> Tensor:
    """Vectors times ``Pᵀ``: in each group of 2 ** factor blocks, every other half of a block, then those between."""
    if factor == 0:
        return rows
    pieces = rows.reshape(*rows.shape[:-1], -1, 2**factor, 2, size // 2)
    return pieces.transpose(-3, -2).reshape(rows.shape)


def _unmixed(rows: Tensor, size: int, factor: int) -> Tensor:
    """Vectors times ``P``."""
    if factor == 0:
        return rows
    pieces = rows.reshape(*rows.shape[:-1], -1, 2, 2**factor, size // 2)
    return pieces.transpose(-3, -2).reshape(rows.shape)
