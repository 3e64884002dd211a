"""Memory in use now, by part of a model and its training."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from nbpeft.engine.contract.registry import resolve_backend
from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.kernels.storage import StoredWeight, inner_tensors, local, short_name, unique_storages
from nbpeft.engine.tree.model_tree import base_model_of, manager_of
from nbpeft.memory.devices import device_memory, join, mark_peak, peak
from nbpeft.memory.formatting import size_text
from nbpeft.memory.saved import SavedTensors, tensors_in
from nbpeft.state import MemoryPart, MemoryState

MAX_AGE = 5.0
"""Seconds after which the model is walked again even if its revision did not change."""


@dataclass
class _Walk:
    """The result of a walk over the model; it holds only numbers and weak references."""

    made: float
    key: tuple[Any, ...]
    kinds: Counter[str] = field(default_factory=Counter)
    adapter_bytes: int = 0
    adapter_names: tuple[str, ...] = ()
    storages: set[int] = field(default_factory=set)
    trainable: list[weakref.ref[nn.Parameter]] = field(default_factory=list)
    devices: tuple[torch.device, ...] = ()


class Meter:
    """Measures one model repeatedly, cheaply enough for a panel that updates twice a second.

    Weights are walked once, and again when adapters change, when the model moves to another device or dtype, or after
    five seconds. Optimizer state is read each time. Gradients are read each time in the training thread; in another
    thread the last values are used. The meter has only a weak reference to the model.

    Args:
        model: a base model or a ``PeftModel``, with or without adapters.
        optimizer: the optimizer whose state to count; by default every optimizer that trains the model, once it has
            done a step.
        saved: a running count of the activations that autograd saves for backward.
        cache: an object that contains a KV cache.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any = None, *, saved: SavedTensors | None = None, cache: Any = None
    ) -> None:
        self._model = weakref.ref(base_model_of(model))
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self.saved = saved
        self.cache = cache
        self._walk: _Walk | None = None
        _note_optimizers()
        self._gradient_bytes = 0
        self._optimizer_bytes: tuple[float, int, int] = (float("-inf"), -1, 0)

    def mark(self) -> None:
        """Reset the peak on the model's devices."""
        for device in self._current_walk().devices:
            mark_peak(device)

    def read(self) -> MemoryState:
        """Return the memory in use now; activations and KV cache are included only if they were given."""
        walk = self._current_walk()
        parts = [MemoryPart("base weights", walk.kinds.total(), _by_kind(walk.kinds))]
        parts.append(MemoryPart("adapters", walk.adapter_bytes, ", ".join(walk.adapter_names)))
        if _may_read_gradients():
            self._gradient_bytes = _gradient_bytes(walk.trainable)
        parts.append(MemoryPart("gradients", self._gradient_bytes))
        parts.append(MemoryPart("optimizer", self._state_bytes(walk)))
        if self.saved is not None:
            parts.append(MemoryPart("activations", self.saved.byte_count, f"peak {size_text(self.saved.peak)}"))
        if self.cache is not None:
            parts.append(MemoryPart("KV cache", sum(unique_storages(tensors_in(self.cache)).values())))
        memory = join(map(device_memory, walk.devices))
        if memory.used is not None:
            rest = memory.used - sum(part.byte_count for part in parts)
            parts.append(MemoryPart("other", max(rest, 0), _what_else(walk.devices)))
        peaks = [peak(device) for device in walk.devices]
        return MemoryState(
            device=", ".join(map(str, walk.devices)) or "meta",
            parts=tuple(parts),
            device_total=memory.total,
            device_free=memory.free,
            peak=None if not peaks or None in peaks else sum(value for value in peaks if value is not None),
        )

    def _current_walk(self) -> _Walk:
        model = self._model()
        if model is None:
            return _Walk(time.monotonic(), ())
        key = _key(model)
        now = time.monotonic()
        if self._walk is None or self._walk.key != key or now - self._walk.made > MAX_AGE:
            self._walk = _walk(model, key, now)
        return self._walk

    def _state_bytes(self, walk: _Walk) -> int:
        optimizers = [self._optimizer()] if self._optimizer is not None else _optimizers_of(walk)
        states = [dict(optimizer.state) for optimizer in optimizers if optimizer is not None]
        made, known, byte_count = self._optimizer_bytes
        size = sum(map(len, states))
        if size != known or time.monotonic() - made > MAX_AGE:
            storages = unique_storages(tensors_in(states))
            byte_count = sum(value for address, value in storages.items() if address not in walk.storages)
            self._optimizer_bytes = (time.monotonic(), size, byte_count)
        return byte_count


_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that did a step since the first meter was created."""
_training_thread: threading.Thread | None = None
"""Thread that did the last optimizer step."""


@functools.cache
def _note_optimizers() -> None:
    """Record every optimizer that does a step from now on; the hook is global, so it is registered only once."""
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: Optimizer, *_: Any) -> None:
    global _training_thread
    _optimizers.add(optimizer)
    _training_thread = threading.current_thread()


def _may_read_gradients() -> bool:
    """Return whether this is the training thread, or the main thread while no thread trains.

    Backward assigns gradients without holding the GIL. Another thread that reads one at that moment can crash the
    process.
    """
    training = _training_thread
    allowed = training if training is not None and training.is_alive() else threading.main_thread()
    return threading.current_thread() is allowed


def _optimizers_of(walk: _Walk) -> list[Optimizer]:
    """Return the recorded optimizers that have a trainable parameter of the model."""
    ours = {id(parameter) for reference in walk.trainable if (parameter := reference()) is not None}
    return [
        optimizer
        for optimizer in list(_optimizers)
        if any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])
    ]


def measure(
    model: nn.Module, optimizer: Any = None, *, saved: SavedTensors | None = None, cache: Any = None
) -> MemoryState:
    """Return the memory that a model, its adapters and its training use now.

    Args:
        model: a base model or a ``PeftModel``, with or without adapters.
        optimizer: the optimizer whose state to count; by default those that train the model.
        saved: a running count of the activations that autograd saves for backward.
        cache: an object that contains a KV cache.
    """
    return Meter(model, optimizer, saved=saved, cache=cache).read()


def weights_by_kind(model: nn.Module) -> dict[str, int]:
    """Return storage format (``bf16``, ``nf4 double``) -> bytes of the base weights, largest first."""
    return dict(_walk(base_model_of(model), (), 0.0).kinds.most_common())


def _key(model: nn.Module) -> tuple[Any, ...]:
    """Return a key that changes when adapters change or when the whole model moves."""
    manager = manager_of(model)
    first = next(model.parameters(), None)
    place = None if first is None else (first.device, first.dtype, local(first).data_ptr() if not first.is_meta else 0)
    return (None if manager is None else manager.revision, place)


def _walk(model: nn.Module, key: tuple[Any, ...], now: float) -> _Walk:
    walk = _Walk(now, key)
    devices: Counter[torch.device] = Counter()
    manager = manager_of(model)
    if manager is not None and manager.alive:
        walk.adapter_names = manager.names
        for name in manager.names:
            weights = manager.weights(name)
            for named in (*weights.adapters.values(), *weights.copies.values()):
                walk.adapter_bytes += _count(walk, named.values(), devices)
        for layer in manager.layers.values():
            walk.adapter_bytes += _count(walk, layer.adapters.buffers(), devices)
    for label, tensors in _base_tensors(model):
        walk.kinds[label] += _count(walk, tensors, devices)
    walk.kinds += Counter()  # drops formats that have no bytes
    walk.trainable = [weakref.ref(p) for p in model.parameters() if p.requires_grad]
    walk.devices = tuple(device for device, _ in devices.most_common())
    return walk


def _count(walk: _Walk, tensors: Iterable[Tensor], devices: Counter[torch.device]) -> int:
    """Return the bytes of the storages that were not counted before."""
    total = 0
    for tensor in tensors:
        for address, byte_count in unique_storages([tensor]).items():
            if address not in walk.storages:
                walk.storages.add(address)
                devices[tensor.device] += byte_count
                total += byte_count
    return total


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield (storage format, tensors) of every base weight; quantized weights include their constants."""
    for module in model.modules():
        backend: Any = resolve_backend(module) if "weight" in module._parameters or not module._modules else None
        if isinstance(backend, StoredWeight) and backend.name != "dense":
            yield backend.label(module), backend.tensors(module)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if isinstance(tensor, QuantizedMatrices):
                yield tensor.form.label, inner_tensors(tensor)
            elif tensor is not None:
                yield short_name(tensor.dtype), [tensor.detach()]


def _gradient_bytes(parameters: Iterable[weakref.ref[nn.Parameter]]) -> int:
    gradients = (parameter.grad for reference in parameters if (parameter := reference()) is not None)
    return sum(unique_storages(gradient for gradient in gradients if gradient is not None).values())


def _by_kind(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} {size_text(byte_count)}" for kind, byte_count in kinds.most_common())


def _what_else(devices: tuple[torch.device, ...]) -> str:
    if all(device.type == "cpu" for device in devices):
        return "Python, libraries, data and temporary tensors"
    return "activations, data and temporary tensors"
