"""How each part of a model is stored: quantized layers, experts, embedding, head and the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import resolve_backend, resolve_layer_kind
from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.kernels.storage import StoredWeight, inner_tensors, short_name, unique_storages
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.tree.model_tree import bare_modules, base_model_of, embedding_of, expert_parameters, frozen_module
from nbpeft.memory.fake_quantized import quantized_bytes

BFLOAT16_BYTES = 2
PARTS = ("quantized layers", "experts", "embedding", "head", "other layers", "norms and biases")


@dataclass(frozen=True)
class StoredPart:
    """One part of a model's weights.

    Attributes:
        name: one of ``PARTS``.
        module_count: number of modules with these weights; for experts, of tensors.
        byte_count: size in bytes, including quantization constants.
        bfloat16_bytes: size of the same weights in bfloat16, in bytes.
        kinds: the storage formats, e.g. ``nf4 double``.
    """

    name: str
    module_count: int
    byte_count: int
    bfloat16_bytes: int
    kinds: tuple[str, ...]

    @property
    def share(self) -> float:
        """Size relative to that in bfloat16."""
        return self.byte_count / self.bfloat16_bytes if self.bfloat16_bytes else 1.0


def stored_parts(model: nn.Module) -> tuple[StoredPart, ...]:
    """Returns the base weights of a model by part, without adapters; a shared weight is counted once.

    Args:
        model: a base model or a PeftModel.
    """
    return estimated_parts(base_model_of(model))


def estimated_parts(
    model: nn.Module,
    layers: Iterable[nn.Module] = (),
    *,
    kind: str = "",
    double: bool = False,
    raised: Iterable[Tensor] = (),
) -> tuple[StoredPart, ...]:
    """Returns the parts as ``stored_parts`` will return them after quantizing layers and casting tensors to float32.

    Works on meta tensors too; the model is not changed.

    Args:
        model: a base model; it must not have adapters if ``layers`` are given.
        layers: the linear layers, and views of experts, to quantize.
        kind: ``nf4``, ``fp4`` or ``int8``.
        double: whether the constants will be quantized too.
        raised: tensors to cast to float32.
    """
    wide = {id(tensor) for tensor in raised}
    chosen = {id(layer.weight): layer for layer in layers}
    sizes: dict[str, list[tuple[int, int]]] = {name: [] for name in PARTS}
    kinds: dict[str, dict[str, None]] = {name: {} for name in PARTS}
    seen: set[int] = set()
    for part, label, tensors, numbers in _weights(model):
        first = tensors[0]
        storages = {id(first): first.nbytes} if first.is_meta else unique_storages(tensors)
        size = sum(count for key, count in storages.items() if key not in seen)
        seen.update(storages)
        if not size:
            continue
        if id(first) in chosen:
            layer = chosen[id(first)]
            size = quantized_bytes(layer, kind, double=double)
            part = "experts" if isinstance(layer, ParameterView) else "quantized layers"
            label = f"{kind} double" if double else kind
        elif id(first) in wide:
            label, size = short_name(torch.float32), 4 * numbers
        sizes[part].append((size, BFLOAT16_BYTES * numbers))
        kinds[part][label] = None
    return tuple(
        StoredPart(
            name, len(found), sum(size for size, _ in found), sum(dense for _, dense in found), tuple(kinds[name])
        )
        for name, found in sizes.items()
        if found
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, str, list[Tensor], int]]:
    """Yields (part, label, tensors, number of weights) of every weight of a base model."""
    special = {
        id(frozen_module(found)): name
        for name, output in (("head", True), ("embedding", False))
        if (found := embedding_of(model, output=output)) is not None
    }
    for _, module in bare_modules(model):
        experts = expert_parameters(module)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(parameter, QuantizedMatrices):
                yield "experts", parameter.form.label, inner_tensors(parameter), parameter.numel()
                continue
            part = "experts" if name in experts else "norms and biases" if parameter.ndim == 1 else "other layers"
            if name != "weight":
                yield part, short_name(parameter.dtype), [parameter], parameter.numel()
                continue
            backend: Any = resolve_backend(module)
            end = special.get(id(module))
            if isinstance(backend, StoredWeight) and backend.name != "dense":
                kind = resolve_layer_kind(module)
                numbers = parameter.numel() if kind is None else math.prod(kind.features(module))
                yield end or "quantized layers", backend.label(module), backend.tensors(module), numbers
            else:
                yield end or part, short_name(parameter.dtype), [parameter], parameter.numel()
