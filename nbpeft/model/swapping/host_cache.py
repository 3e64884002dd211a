"""The pool's LRU cache of adapters in host memory, and reading them from files.

Used by :class:`~nbpeft.model.swapping.pool.AdapterPool`.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from nbpeft import checkpoint
from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, Untargeted
from nbpeft.engine.contract.registry import backend_named, method_of
from nbpeft.engine.injection.build import adapter_dtype
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.fused_layers import of_former_file
from nbpeft.engine.tree.model_tree import walk
from nbpeft.errors import AdapterError, CheckpointError, few
from nbpeft.model.saving.loading import base_mismatch, drop_unchanged, expected
from nbpeft.model.saving.offloaded import embedding_weights
from nbpeft.names import BOOKKEEPING_FIELDS

_MAX_LAYOUTS = 64
"""Number of cached layouts, each of which has the shapes of all layers."""
_WITHOUT_POOL = "load it without a pool"


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter is loaded from.

    Attributes:
        source: a folder or a hub id.
        options: hub options and ``subfolder``.
    """

    source: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # a token may be among them


@dataclass(frozen=True)
class ShapeSignature:
    """Shapes of an adapter's tensors on a model; adapters with equal signatures can overwrite each other.

    Attributes:
        method: label of the method.
        adapters: path -> parameter -> shape.
        copies: path of a module in ``modules_to_save`` -> parameter or buffer -> shape.
        can_overwrite: False if its layers share tensors, so that it can neither overwrite nor be overwritten.
    """

    method: str
    adapters: Mapping[str, Mapping[str, tuple[int, ...]]]
    copies: Mapping[str, Mapping[str, tuple[int, ...]]]
    can_overwrite: bool


@dataclass(frozen=True)
class HostAdapter:
    """An adapter in host memory, in the form that it has on the model's device.

    Attributes:
        config: its config.
        weights: its tensors, in the dtypes that they have on the model.
        signature: their shapes.
        note: a warning about its base model, or None.
    """

    config: AdapterConfig
    weights: AdapterWeights
    signature: ShapeSignature
    note: str | None = None

    @functools.cached_property
    def byte_count(self) -> int:
        """Size of the tensors in bytes."""
        return self.weights.byte_count


@dataclass(frozen=True)
class _Layout:
    """What is computed once for all adapters with the same config except names and values."""

    plan: InjectionPlan
    signature: ShapeSignature
    expected: checkpoint.Expected
    dtypes: Mapping[str, torch.dtype]
    copy_dtypes: Mapping[str, Mapping[str, torch.dtype]]
    shared_dtype: torch.dtype | None

    def arrange(self, weights: AdapterWeights) -> AdapterWeights:
        """Returns the tensors in the model's order and dtypes."""
        adapters = {
            path: {key: weights.adapters[path][key].to(self.dtypes[path]) for key in shapes}
            for path, shapes in self.expected.adapters.items()
        }
        copies = {
            path: {key: weights.copies[path][key].to(dtype) for key, dtype in named.items()}
            for path, named in self.copy_dtypes.items()
        }
        shared = {key: weights.shared[key].to(self.shared_dtype) for key in self.expected.shared}
        return AdapterWeights(adapters, copies, shared=shared)


class AdapterReader:
    """Reads adapters for one model. Thread-safe; changes nothing on the model.

    Args:
        manager: manager of the model.
        half: use the base's dtype for adapters even if it is a half-precision one.
    """

    def __init__(self, manager: AdapterManager, *, half: bool) -> None:
        self._manager = manager
        self._half = half
        self._conversion = checkpoint.key_conversion_of(manager.model)
        self._lock = threading.Lock()
        self._layouts: OrderedDict[str, _Layout] = OrderedDict()
        self._notes: dict[str, str | None] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self, name: str, source: AdapterSource) -> HostAdapter:
        """Reads a whole adapter.

        Args:
            name: name of the adapter, for messages.
            source: where it is.

        Raises:
            CheckpointError: the file cannot be read, does not fit or lacks tensors.
            AdapterError: an adapter of this kind cannot be in a pool.
        """
        saved = checkpoint.read_checkpoint(source.source, device="cpu", **source.options)
        config, tensors = saved.reconciled(saved.config.copy(inference_mode=True))
        config = of_former_file(self._manager.model, config, tensors)
        layout = self._layout(name, config)
        loaded = checkpoint.from_file(
            tensors, layout.expected, peft_type=method_of(config).peft_type, conversion=self._conversion
        )
        for what, keys in (("lacks", loaded.missing), ("has unexpected", loaded.unexpected)):
            if keys:
                raise CheckpointError(
                    f"adapter {name!r} in {source.source} {what} {few(keys, 1, quoted=False)}", keys=keys
                )
        self._drop_unchanged_embeddings(name, loaded.weights)
        layout.plan.share_in(loaded.weights)
        weights = layout.arrange(loaded.weights)
        return HostAdapter(config, weights, layout.signature, self._note(saved.metadata))

    def _layout(self, name: str, config: AdapterConfig) -> _Layout:
        fields = {
            key: value for key, value in vars(config).items() if key not in (*BOOKKEEPING_FIELDS, *config.value_fields)
        }
        key = json.dumps(fields, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
        with DeferredInterrupts(), self._lock:
            if key not in self._layouts:
                self._layouts[key] = self._make_layout(name, config)
                if len(self._layouts) > _MAX_LAYOUTS:
                    self._layouts.popitem(last=False)
            self._layouts.move_to_end(key)
            return self._layouts[key]

    def _make_layout(self, name: str, config: AdapterConfig) -> _Layout:
        model = self._manager.model
        plan = self._manager.plan(config, is_new=False)
        if plan.biases:
            raise AdapterError(
                f"adapter {name!r} trained the base model's biases (bias={getattr(config, 'bias', None)!r}), which "
                f"adapters cannot share: {_WITHOUT_POOL}"
            )
        if config.initialised_from_weight:
            raise AdapterError(f"the init of adapter {name!r} changes the base weights: {_WITHOUT_POOL}")
        if method_of(plan.config).transforms_calls:
            raise AdapterError(f"adapter {name!r} changes the model's calls ({plan.method}): {_WITHOUT_POOL}")
        if any(issubclass(target.adapter_class, Untargeted) for target in plan.targets):
            raise AdapterError(
                f"adapter {name!r} trained rows of embeddings (trainable_token_indices): {_WITHOUT_POOL}"
            )
        tied = next((target for target in plan.targets if target.tied_to), None)
        if tied is not None:
            raise AdapterError(
                f"adapter {name!r} has the same tensors on {tied.path} and {tied.tied_to} (ensure_weight_tying): "
                f"{_WITHOUT_POOL}"
            )
        if any(target.fixed for target in plan.targets):
            raise AdapterError(f"adapter {name!r} has its own tensors that are not trained: {_WITHOUT_POOL}")
        wanted = expected(model, plan)
        modules = {site.path: site.module for site in walk(model)}
        dtypes = {}
        for target in plan.targets:
            module = target.adapted_in(modules[target.module_path])
            dtypes[target.path] = adapter_dtype(backend_named(target.backend), module, half=self._half)
        copy_dtypes = {
            path: {key: tensor.dtype for key, tensor in modules[path].state_dict().items()} for path in wanted.copies
        }
        shares = bool(plan.shared) or any(target.tied for target in plan.targets)
        signature = ShapeSignature(method_of(plan.config).label, wanted.adapters, wanted.copies, not shares)
        shared_dtype = dtypes[plan.targets[0].path] if plan.targets else None
        return _Layout(plan, signature, wanted, dtypes, copy_dtypes, shared_dtype)

    def _drop_unchanged_embeddings(self, name: str, weights: AdapterWeights) -> None:
        """Drops embeddings in the file that equal the base's; an adapter with different ones cannot be in a pool."""
        present = embedding_weights(self._manager.model, loaded=True) if weights.base else {}
        changed = drop_unchanged(weights, present)
        if changed:
            raise AdapterError(f"adapter {name!r} has its own {changed[0]}, which all adapters share: {_WITHOUT_POOL}")

    def _note(self, metadata: Mapping[str, str]) -> str | None:
        """Returns the message of ``base_mismatch``, cached for all adapters of the same base."""
        if self._manager.merged:
            return None
        key = json.dumps({name: value for name, value in metadata.items() if name.startswith("nbpeft.base.")})
        if key not in self._notes:
            self._notes[key] = base_mismatch(self._manager, metadata)
        return self._notes[key]


class _ReadAbandoned(Exception):
    """Another thread was interrupted while it read an adapter."""


class HostCache:
    """LRU cache of adapters in host memory.

    Threads that request the same name at the same time share one read.

    Args:
        limit: maximal size in bytes.
        read: reads an adapter by name.
    """

    def __init__(self, limit: int, read: Callable[[str], HostAdapter]) -> None:
        self.limit = limit
        self.byte_count = 0
        self.reads = 0
        self.read_bytes = 0
        self.hits = 0
        self._read = read
        self._entries: OrderedDict[str, HostAdapter] = OrderedDict()
        self._reading: dict[str, Future[HostAdapter]] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The cached adapters, least recently used first."""
        with DeferredInterrupts(), self._lock:
            return tuple(self._entries)

    def get(self, name: str, *, prefetch: bool = False) -> HostAdapter:
        """Returns an adapter from the cache or from its files; raises the errors of reading.

        Args:
            name: name of the adapter.
            prefetch: the adapter is not needed yet, so that this does not count as a hit.
        """
        own: Future[HostAdapter] = Future()
        try:
            with DeferredInterrupts(), self._lock:
                if name in self._entries:
                    self._entries.move_to_end(name)
                    self.hits += not prefetch
                    return self._entries[name]
                future = self._reading.setdefault(name, own)
                self.hits += future is not own and not prefetch
            if future is own:
                self._fill(name, own)
            return future.result()
        except _ReadAbandoned:
            return self.get(name, prefetch=prefetch)
        except BaseException as error:
            with DeferredInterrupts():
                if self._end_reading(name, own) and not own.done():
                    own.set_exception(error if isinstance(error, Exception) else _ReadAbandoned())
            raise

    def _fill(self, name: str, future: Future[HostAdapter]) -> None:
        adapter = self._read(name)
        self.reads += 1
        self.read_bytes += adapter.byte_count
        if self._end_reading(name, future):
            self.put(name, adapter)
        future.set_result(adapter)

    def _end_reading(self, name: str, future: Future[HostAdapter]) -> bool:
        """Ends a read; returns False if the adapter was dropped meanwhile, so that the result must not be cached."""
        with DeferredInterrupts(), self._lock:
            current = self._reading.get(name) is future
            if current:
                del self._reading[name]
            return current

    def put(self, name: str, adapter: HostAdapter) -> None:
        """Caches an adapter, unless it alone exceeds the limit.

        Args:
            name: name of the adapter.
            adapter: the adapter.
        """
        with DeferredInterrupts(), self._lock:
            self._evict(name)
            if adapter.byte_count > self.limit:
                return
            self._entries[name] = adapter
            self.byte_count += adapter.byte_count
            while self.byte_count > self.limit:
                self._evict(next(iter(self._entries)))

    def drop(self, name: str) -> None:
        """Drops an adapter from the cache, even while it is being read."""
        with DeferredInterrupts(), self._lock:
            self._evict(name)
            self._reading.pop(name, None)

    def _evict(self, name: str) -> None:
        evicted = self._entries.pop(name, None)
        if evicted is not None:
            self.byte_count -= evicted.byte_count
