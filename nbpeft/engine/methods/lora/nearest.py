"""The LoRA that is closest to the deltas of an adapter of any method.

    Δ ≈ B A        the largest singular values of Δ and their vectors (Eckart and Young 1936)

If Δ is the product of two thin matrices, its singular values are those of a small core between them, and Δ is never
built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.contract.adapter import Adapter, ConvertsToLora, delta_of, source_of
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.kernels.numerics import widened
from nbpeft.engine.methods.lora.combining.config import rank_patterns
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.conversion import KEPT_FIELDS, padded
from nbpeft.engine.methods.lora.low_rank import low_rank_of
from nbpeft.errors import ConfigError

_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "trainable_token_indices")


@dataclass(frozen=True)
class NearestFactors:
    """The closest LoRA on one layer.

    Attributes:
        tensors: parameter name -> tensor, in the dtype of the approximated adapter.
        rank: rows of A.
        kept: share of ‖Δ‖² that is kept, from 0 to 1.
    """

    tensors: dict[str, Tensor]
    rank: int
    kept: float


def check_rank(rank: object) -> None:
    """Checks a rank, or a share of ‖Δ‖² to keep.

    Raises:
        ConfigError: it is neither a positive integer nor a float from 0 to 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise ConfigError(f"rank must be a whole number, or the share to keep such as 0.9, not {rank!r:.60}")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}.",
            rank=rank,
        )
    if rank <= 0:
        raise ConfigError(f"Passing a rank of {rank} doesn't make sense: it must be at least 1", rank=rank)


@torch.no_grad()
def nearest_factors(adapter: Adapter, base: BaseLayer, rank: int | float, path: str, scale: float) -> NearestFactors:
    """Returns the factors closest to an adapter's delta on one layer.

    Args:
        adapter: an adapter of any method.
        base: the layer.
        rank: rank of the factors, or the least share of ‖Δ‖² that they keep.
        path: path of the layer, for messages.
        scale: factor on the adapter's delta.

    Raises:
        ConfigError: the rank is larger than the weight.
    """
    low_rank = low_rank_of(base.kind)
    left, values, right = _decomposed(adapter, base)
    most = min(left.shape[0], right.shape[1])
    if rank > most:
        raise ConfigError(
            f"The chosen rank {rank} is larger than the weight shape ({most}), please choose a lower rank: {path} has "
            f"{left.shape[0]} outputs and {right.shape[1]} inputs",
            rank=rank,
            path=path,
        )
    energies = values.cpu().double().square()
    energies[values.cpu() <= values.max().cpu() * most * torch.finfo(values.dtype).eps] = 0  # rounding errors
    kept = energies.cumsum(0)
    total = float(kept[-1])
    count = rank if isinstance(rank, int) else int((kept < rank * total).sum()) + 1
    count = min(count, len(values))
    size = rank if isinstance(rank, int) else count
    name_A, name_B = low_rank.factor_names
    shape_A, shape_B = low_rank.shapes(base.module, size)
    own = next((source_of(adapter) or adapter).parameters(), None)  # None if its parameters are shared
    dtype = values.dtype if own is None else own.dtype
    lora_A = padded(right[:count], 0, size).to(dtype, copy=True).contiguous()
    lora_B = padded(left[:, :count] * (values[:count] * scale), 1, size).to(dtype).contiguous()
    share = float(kept[count - 1]) / total if total else 1.0
    return NearestFactors({name_A: lora_A.view(shape_A), name_B: lora_B.view(shape_B)}, size, share)


def _decomposed(adapter: Adapter, base: BaseLayer) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values of Δ, largest first, and their vectors: (out, k), (k,), (k, in * kernel)."""
    factors = adapter.low_rank_delta(base) if isinstance(adapter, ConvertsToLora) else None
    if factors is not None and factors.rank < min(factors.up.shape[0], math.prod(factors.down.shape[1:])):
        left, left_core = torch.linalg.qr(_wide(factors.up))
        right, right_core = torch.linalg.qr(_wide(factors.down).T)
        rotated_left, values, rotated_right = _singular(left_core @ right_core.T * factors.scaling)
        return left @ rotated_left, values, rotated_right @ right.T
    weight = base.weight()
    if adapter.reads_weight:
        weight = widened(weight)
    return _singular(_wide(delta_of(adapter, weight, base)))


def _wide(tensor: Tensor) -> Tensor:
    """A tensor as a matrix, in at least float32."""
    return widened(tensor.flatten(1))


def _singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def add_bias(tensors: dict[str, Tensor], bias: Tensor | None, base: BaseLayer) -> None:
    """Adds a bias of B to factors: an adapter's change of the layer's bias, or zeros.

    Args:
        tensors: parameter name -> factor; changed in place.
        bias: the change, (out,), or None.
        base: the layer.
    """
    name_B = low_rank_of(base.kind).factor_names[1]
    like = tensors[name_B]
    tensors[f"{name_B}_bias"] = like.new_zeros(base.out_features) if bias is None else bias.to(like)


def nearest_config(config: Any, rank: int | float, ranks: Mapping[str, int], *, biased: bool) -> LoraConfig:
    """Returns the config of the closest LoRA, whose scalings are all 1.

    Args:
        config: config of the approximated adapter, whose targets and task are kept.
        rank: the requested rank or share; with a share every layer's rank is in ``rank_pattern``, as in PEFT.
        ranks: path -> rank.
        biased: whether the LoRA has biases (``lora_bias``).
    """
    usual = rank if isinstance(rank, int) else 1
    patterns = {} if isinstance(rank, int) else rank_patterns(ranks, ())
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=dict(patterns),
        alpha_pattern=dict(patterns),
        lora_bias=biased,
        **{name: getattr(config, name) for name in (*KEPT_FIELDS, *_TARGETS) if hasattr(config, name)},
    )
