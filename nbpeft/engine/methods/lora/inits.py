"""How the two factors of an adapter start, by the value of ``init_lora_weights``.

    True             A uniform in 1 / sqrt(fan in), B zero
    "gaussian"       A normal with deviation 1 / r, B zero
    False            both random: not the identity at start
    "orthogonal"     rows of one orthogonal matrix, shared out: B A = 0 though neither is zero (even ranks)
    "olora"          B, A = Q, R of the weight's first r columns (Büyükakyüz 2024, arXiv:2406.01775)
    "pissa"          the r largest singular directions of the weight (Meng et al. 2024, arXiv:2404.02948)
    "pissa_niter_N"  the same by a randomized SVD of N iterations

OLoRA and PiSSA train a part ``s B0 A0`` of the weight itself, so that part has to leave the base.
PEFT subtracts it from the base's weight for good. Here the base stays as it is and the adapter
subtracts it, ``W + s (B A - B0 A0)``: other adapters, ``disable_adapter`` and ``unload`` find the
model they expect, and half-precision or quantized weights are not rounded again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nbpeft.engine.adapter import AdapterSite
from nbpeft.engine.base import LayerKind
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.low_rank import low_rank_of
from nbpeft.engine.numerics import is_finite
from nbpeft.errors import ConfigError

_SEED = 0
"""Of a randomized SVD: whoever loads an adapter has to find the part it started from again."""
_ORTHOGONAL_SCALE = 10.0

Factors = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""


def check_init(config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> None:
    """Refuses a layer on which the config's init does not work.

    Raises:
        ConfigError: the layer is not linear, or this init does not support the rank or scaling.
    """
    orthogonal = config.init_name == "orthogonal"
    if not (orthogonal or config.initialised_from_weight):
        return
    told = f"init_lora_weights={config.init_lora_weights!r}"
    if not kind.is_linear:
        raise ConfigError(f"{path}: {told} works on linear layers only, not on an {kind.name}; exclude it", path=path)
    rank, largest = config.rank_at(path), min(kind.features(module))
    if orthogonal and rank % 2:
        raise ConfigError(f"{path}: {told} needs an even rank, not {rank}", field="r", path=path)
    if config.initialised_from_weight and rank > largest:
        raise ConfigError(f"{path}: {told} takes a rank of at most {largest} there, not {rank}", field="r", path=path)
    if config.initialised_from_weight and config.scaling_at(path) <= 0:
        raise ConfigError(f"{path}: {told} needs an alpha above 0", field="lora_alpha", path=path)


def init_factors(config: LoraConfig, site: AdapterSite, initial: Factors | None) -> dict[str, Tensor]:
    """Makes new low-rank factors on the base layer's device.

    Args:
        config: gives the init and the rank.
        site: the layer; of its shapes the first two are the factors', and anything after them starts at zero.
        initial: what ``weight_component`` gave: the factors themselves, where it is not None.

    Returns:
        Parameter name -> tensor.
    """
    device, dtype = site.base.device, site.dtype
    tensors = {name: torch.empty(shape, device=device, dtype=dtype) for name, shape in site.shapes.items()}
    first, second, *rest = tensors.values()
    for extra in rest:
        extra.zero_()
    init, lookup = config.init_name, low_rank_of(site.base.kind).zero_init_factor == 0
    if initial is not None:
        first.copy_(initial[0])
        second.copy_(initial[1])
    elif init == "orthogonal":
        _fill_orthogonal(first, second)
    elif init == "random":
        for factor in (first, second):
            factor.normal_() if lookup else _uniform(factor)
    elif lookup:
        first.zero_()
        second.normal_()
    else:
        first.normal_(std=1.0 / config.rank_at(site.path)) if init == "gaussian" else _uniform(first)
        second.zero_()
    return tensors


def _uniform(factor: Tensor) -> None:
    """Uniform in 1 / sqrt(fan in), as torch initialises a linear layer."""
    bound = 1.0 / math.sqrt(max(1, math.prod(factor.shape[1:])))
    factor.uniform_(-bound, bound)


def _fill_orthogonal(lora_A: Tensor, lora_B: Tensor) -> None:
    rank, (out_features, in_features) = lora_A.shape[0], (lora_B.shape[0], lora_A.shape[1])
    device = lora_A.device
    rows = torch.linalg.qr(torch.randn(rank, rank, device=device))[0]
    lora_A.copy_((torch.randn(in_features, rank // 2, device=device) @ rows[0::2]).T / _ORTHOGONAL_SCALE)
    lora_B.copy_((torch.randn(out_features, rank // 2, device=device) @ rows[1::2]) / _ORTHOGONAL_SCALE)


@torch.no_grad()
def weight_component(config: LoraConfig, site: AdapterSite) -> Factors | None:
    """Computes the part ``s B0 A0`` of the weight that an adapter takes over at its start; None for other inits.

    It depends on the weight and the config alone, so that an adapter's file need not hold it.

    Returns:
        A0 and B0 in the dtype of the adapter, computed in float32 at least.

    Raises:
        ConfigError: the weight is not finite.
    """
    if not config.initialised_from_weight:
        return None
    path, weight = site.path, site.base.weight()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not weight.is_meta and not is_finite(weight):
        raise ConfigError(
            f"{path}: init_lora_weights={config.init_lora_weights!r} starts in the weight, which is not finite",
            path=path,
        )
    rank, scaling = config.rank_at(path), config.scaling_at(path)
    lora_A, lora_B = _olora(weight, rank) if config.init_name == "olora" else _pissa(weight, rank, scaling, config)
    return lora_A.to(site.dtype).contiguous(), lora_B.to(site.dtype).contiguous()


def _olora(weight: Tensor, rank: int) -> Factors:
    """Q and R of a QR decomposition, cut off at a rank; the other columns of Q are never made."""
    lora_B = torch.linalg.qr(weight[:, :rank])[0]
    return lora_B.T @ weight, lora_B


def _pissa(weight: Tensor, rank: int, scaling: float, config: LoraConfig) -> Factors:
    if config.pissa_iterations is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        left, values, right = _randomized_svd(weight, rank, config.pissa_iterations)
    root = (values / scaling).sqrt()
    return root[:, None] * right, left * root


def _randomized_svd(weight: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch.svd_lowrank``, from the same draws on every device, since they decide what is found.

    Reference: Halko et al. 2009, arXiv:0909.4061.
    """
    generator = torch.Generator().manual_seed(_SEED)
    draws = torch.randn(weight.shape[1], rank, generator=generator, dtype=weight.dtype).to(weight.device)
    basis = torch.linalg.qr(weight @ draws)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(weight.T @ basis)[0]
        basis = torch.linalg.qr(weight @ basis)[0]
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ left, values, right
