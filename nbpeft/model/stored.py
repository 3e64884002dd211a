"""How the weights of a model are stored, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.registry import resolve_backend
from nbpeft.engine.storage import StoredWeight, distinct_storages, short_name
from nbpeft.engine.tokens import embedding_of
from nbpeft.memory.fake_quantized import quantized_bytes

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
    counted: list[_Entry] = []
    seen: set[int] = set()
    for part, label, tensors, numbers, _ in _weights(base):
        size = _new_bytes(distinct_storages(tensors), seen)
        if size:
            counted.append((part, label, size, numbers))
    return _summed(counted)


def foreseen_parts(
    model: nn.Module, paths: Iterable[str] = (), *, kind: str = "", double: bool = False, raised: Iterable[Tensor] = ()
) -> tuple[StoredPart, ...]:
    """What ``stored_parts`` will say once layers are quantized and tensors raised to float32.

    Works on meta tensors, too; the model is not changed.

    Args:
        model: a base model without adapters.
        paths: the linear layers that will be quantized.
        kind: ``nf4``, ``fp4`` or ``int8``.
        double: whether their constants will be quantized, too.
        raised: what will be float32.
    """
    wide = {id(tensor) for tensor in raised}
    chosen = {id(model.get_submodule(path).weight) for path in paths}
    counted: list[_Entry] = []
    seen: set[int] = set()
    for part, label, tensors, numbers, module in _weights(model):
        first = tensors[0]
        size = _new_bytes({id(first): first.nbytes} if first.is_meta else distinct_storages(tensors), seen)
        if not size:
            continue
        if id(first) in chosen:
            rows, columns = first.shape if isinstance(module, nn.Linear) else reversed(first.shape)
            size = quantized_bytes(rows, columns, kind, double=double)
            counted.append(("quantized layers", f"{kind} double" if double else kind, size, numbers))
        elif id(first) in wide:
            counted.append((part, short_name(torch.float32), 4 * numbers, numbers))
        else:
            counted.append((part, label, size, numbers))
    return _summed(counted)


_Entry = tuple[str, str, int, int]
"""Part, how it is stored, its bytes, and how many numbers it stands for."""


def _new_bytes(storages: dict[int, int], seen: set[int]) -> int:
    """Bytes of the storages that were not seen before."""
    size = sum(count for key, count in storages.items() if key not in seen)
    seen.update(storages)
    return size


def _summed(entries: Iterable[_Entry]) -> tuple[StoredPart, ...]:
    counts: dict[str, list[int]] = {name: [0, 0, 0] for name in PARTS}
    kinds: dict[str, dict[str, None]] = {name: {} for name in PARTS}
    for part, label, size, numbers in entries:
        for place, value in enumerate((1, size, BFLOAT16_BYTES * numbers)):
            counts[part][place] += value
        kinds[part][label] = None
    return tuple(
        StoredPart(name, modules, size, dense, tuple(kinds[name]))
        for name, (modules, size, dense) in counts.items()
        if modules
    )


def _weights(base: nn.Module) -> Iterator[tuple[str, str, list[Tensor], int, nn.Module]]:
    """(part, label, tensors, how many numbers they stand for, module) of every weight of a base model."""
    special = {id(module): name for name, module in _ends(base)}
    for module in _plain_modules(base):
        for entry in _weights_of(module, special.get(id(module))):
            yield *entry, module


def _ends(base: Any) -> Iterator[tuple[str, nn.Module]]:
    """The embedding and the head, if the model has any."""
    for name, output in (("head", True), ("embedding", False)):
        found: Any = embedding_of(base, output=output)
        if found is not None:
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
