"""Factors of single experts, as in files from before transformers 5, joined to the factors of one parameter.

The two parts of a gated projection have the same input, so they are one product of the sum of their ranks: its A has
the rows of one part after those of the other, and its B is block-diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_OF_AN_EXPERT = re.compile(r"(.+\.experts)\.(\d{1,5})\.(\w+)\.(lora_[AB])\.weight")
FACTORS = ("lora_A", "lora_B")

Experts = dict[tuple[str, str], dict[int, Tensor]]
"""(layer, factor) -> expert -> tensor."""


@torch.no_grad()
def fuse(tensors: Mapping[str, Tensor], fused: Mapping[str, tuple[str, ...]]) -> Mapping[str, Tensor]:
    """Joins factors of experts; see ``Method``.

    Args:
        tensors: key in the file -> tensor.
        fused: parameter of the experts -> the layers of each expert that became it, in the parameter's order.

    Returns:
        A copy with the factors joined; if a part is missing, the factors of that block's experts are left unchanged.
    """
    found: dict[str, Experts] = {}
    keys: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        match = _OF_AN_EXPERT.fullmatch(key)
        if match is not None and tensor.ndim == 2 and tensor.layout is torch.strided:
            module, expert, layer, factor = match.groups()
            found.setdefault(module, {}).setdefault((layer, factor), {})[int(expert)] = tensor
            keys.setdefault(module, []).append(key)
    joined: dict[str, Tensor] = {}
    gone: set[str] = set()
    for module, experts in found.items():
        made = _of_module(module, experts, fused)
        joined |= made
        gone.update(keys[module] if made else ())
    return {**{key: tensor for key, tensor in tensors.items() if key not in gone}, **joined} if gone else tensors


def _of_module(module: str, experts: Experts, fused: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Both factors of each parameter under the keys of PEFT's files; empty if some are missing."""
    names = [name for name, layers in fused.items() if any((layer, FACTORS[0]) in experts for layer in layers)]
    wanted = {(layer, factor) for name in names for layer in fused[name] for factor in FACTORS}
    every = range(len(next(iter(experts.values()))))
    if experts.keys() != wanted or any(
        tensors.keys() != set(every) or len({tensor.shape for tensor in tensors.values()}) > 1
        for tensors in experts.values()
    ):
        return {}
    made = {}
    for place, name in enumerate(names):
        inner = ".base_layer" * (len(names) - 1 - place)  # PEFT wraps the module once for each of its parameters
        for factor in FACTORS:
            parts = [[experts[layer, factor][e] for e in every] for layer in fused[name]]
            made[f"{module}{inner}.{factor}.weight"] = joined(factor, parts)
    return made


def joined(factor: str, parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """One factor of a parameter, as in PEFT's files.

    Args:
        factor: name of the factor.
        parts: for each layer that became part of the parameter, in its order, the factors of all experts.

    Returns:
        A, (experts * r, in), or B, (out, r * experts), where r and out are the sums over the layers.
    """
    if factor == FACTORS[0]:
        return torch.cat([torch.cat(of_one) for of_one in zip(*parts, strict=True)])
    blocks = [torch.block_diag(*of_one) for of_one in zip(*parts, strict=True)]
    return torch.stack(blocks, dim=-1).flatten(1)
