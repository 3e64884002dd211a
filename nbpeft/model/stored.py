"""How the weights of a model are stored, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.registry import resolve_backend
from nbpeft.engine.storage import StoredWeight, distinct_storages, short_name

BFLOAT16_BYTES = 2
PARTS = ("quantized layers", "embedding", "head", "other layers", "norms and biases")


@dataclass(frozen=True)
class StoredPart:
    """One part of a model's weights.

    Attributes:
        name: one of ``PARTS``.
        module_count: modules that hold its weights.
        byte_count: what it takes, quantization constants included.
        bfloat16_bytes: what the same weights would take in bfloat16.
        kinds: how they are stored, e.g. ``nf4 double``.
    """

    name: str
    module_count: int
    byte_count: int
    bfloat16_bytes: int
    kinds: tuple[str, ...]

    @property
    def share(self) -> float:
        """Bytes as a share of those in bfloat16."""
        return self.byte_count / self.bfloat16_bytes if self.bfloat16_bytes else 1.0


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a module's weight is stored by another backend than the dense one."""
    if "weight" not in module._parameters and module._modules:
        return False
    backend = resolve_backend(module)
    return backend is not None and backend.name != "dense"


def stored_parts(model: nn.Module) -> tuple[StoredPart, ...]:
    """The base weights of a model by part, without adapters; a shared weight counts once.

    Args:
        model: a base model, or a handle on one.
    """
    manager = model.__dict__.get("manager")
    base: Any = manager.model if isinstance(manager, AdapterManager) else model
    special = {id(module): name for name, module in _ends(base)}
    counts: dict[str, list[int]] = {name: [0, 0, 0] for name in PARTS}
    kinds: dict[str, dict[str, None]] = {name: {} for name in PARTS}
    seen: set[int] = set()
    for module in _plain_modules(base):
        for part, label, tensors, numbers in _weights_of(module, special.get(id(module))):
            storages = {key: size for key, size in distinct_storages(tensors).items() if key not in seen}
            if not storages:
                continue
            seen.update(storages)
            for place, value in enumerate((1, sum(storages.values()), BFLOAT16_BYTES * numbers)):
                counts[part][place] += value
            kinds[part][label] = None
    return tuple(
        StoredPart(name, modules, size, dense, tuple(kinds[name]))
        for name, (modules, size, dense) in counts.items()
        if modules
    )


def _ends(base: Any) -> Iterator[tuple[str, nn.Module]]:
    """The embedding and the head, if the model has any."""
    for name, getter in (("head", "get_output_embeddings"), ("embedding", "get_input_embeddings")):
        try:
            found = getattr(base, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(found, nn.Module):
            yield name, getattr(found, "base_layer", found)


def _plain_modules(base: nn.Module) -> Iterator[nn.Module]:
    """Modules of the base itself: what adapters brought is passed over."""
    pending = [base]
    while pending:
        module = pending.pop(0)
        if isinstance(module, AdaptedLayer):
            pending.insert(0, module.base_layer)
            continue
        yield module
        skipped = ("modules_to_save",) if "original_module" in module._modules else ()
        pending[:0] = [child for name, child in module._modules.items() if child is not None and name not in skipped]


def _weights_of(module: nn.Module, end: str | None) -> Iterator[tuple[str, str, list[Tensor], int]]:
    """(part, label, tensors, how many numbers they stand for) of a module's own weights."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    weight = own.pop("weight", None)
    if weight is not None:
        backend: Any = resolve_backend(module)
        quantized = isinstance(backend, StoredWeight) and backend.name != "dense"
        tensors = backend.tensors(module) if quantized else [weight]
        label = backend.label(module) if quantized else short_name(weight.dtype)
        numbers = logical_count(module, weight, quantized)
        part = "quantized layers" if quantized and end is None else end
        part = part or ("norms and biases" if weight.ndim == 1 else "other layers")
        yield part, label, tensors, numbers
    for parameter in own.values():
        part = "norms and biases" if parameter.ndim == 1 else "other layers"
        yield part, short_name(parameter.dtype), [parameter], parameter.numel()


def logical_count(module: Any, weight: Tensor, quantized: bool) -> int:
    """How many numbers a stored weight stands for."""
    if not quantized:
        return weight.numel()
    for names in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        sizes = [getattr(module, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return int(torch.Size([int(size) for size in sizes if size is not None]).numel())
    return weight.numel()
