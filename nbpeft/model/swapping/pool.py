"""AdapterPool: more adapters on one base model than fit on its device.

    files        all registered adapters, by folder or hub id
    host memory  LRU cache of prefetched and evicted adapters, with its own limit
    device       LRU cache of the most recently used adapters; only these are on the model

Calls name adapters as usual (``set_adapter``, ``adapter_names=[…]``) and the pool loads missing ones. The least
recently used adapters are evicted; an adapter with the same shapes is overwritten in place, so that a miss costs
reading a file and one copy of its tensors. Files are read without blocking other threads. The model changes only
between calls, in a transaction of its manager.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import nn

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import unwrapped
from nbpeft.errors import AdapterError, AdapterExistsError, BusyError, UnknownAdapterError, did_you_mean
from nbpeft.jsonable import AsDict
from nbpeft.model.handle.peft_model import PeftModel
from nbpeft.model.saving.loading import HUB_OPTIONS
from nbpeft.model.swapping.device_cache import MB, DeviceCache
from nbpeft.model.swapping.host_cache import AdapterReader, AdapterSource, HostAdapter, HostCache

_RETRY_SECONDS = 1.0
"""Seconds after which a thread that waits for memory checks again, even without a notification."""


@dataclass(frozen=True)
class PoolStatistics(AsDict):
    """State and counters of a pool.

    Attributes:
        registered: number of registered adapters.
        resident: number of adapters on the model's device.
        on_host: number of adapters in host memory only.
        device_bytes: size of the resident adapters in bytes.
        device_limit: its limit in bytes.
        host_bytes: size of the adapters in host memory in bytes.
        host_limit: its limit in bytes.
        hits: requests for an adapter that was resident.
        misses: requests for an adapter that was not resident.
        host_hits: misses that were served from host memory, or by a read that was already running.
        reads: number of adapters read from files.
        read_bytes: size of their tensors in bytes.
        evictions: number of adapters evicted from the device.
        swaps: number of evicted adapters that were overwritten in place.
    """

    registered: int
    resident: int
    on_host: int
    device_bytes: int
    device_limit: int
    host_bytes: int
    host_limit: int
    hits: int
    misses: int
    host_hits: int
    reads: int
    read_bytes: int
    evictions: int
    swaps: int

    @property
    def hit_rate(self) -> float:
        """Share of the requests that found the adapter resident; 1 before the first request."""
        requests = self.hits + self.misses
        return self.hits / requests if requests else 1.0

    def __str__(self) -> str:
        return (
            f"{self.resident} of {self.registered} adapters resident "
            f"({self.device_bytes / MB:.1f} of {self.device_limit / MB:.1f} MB), {self.on_host} in host memory "
            f"({self.host_bytes / MB:.1f} of {self.host_limit / MB:.1f} MB), {self.hit_rate:.0%} hits, "
            f"{self.evictions} evictions"
        )


class AdapterPool:
    """Keeps the most recently used adapters on the model, and loads others when they are used.

    Adapters of a pool are frozen. An adapter is never evicted while it is pinned, active, used by a running call, or
    changed since it was loaded. Adapters that were added to the model by other means stay on it and do not count
    towards the limit. If an adapter's folder changes, the pool continues to use what it has read, until the adapter is
    unregistered and registered again.

    Args:
        model: a PeftModel, a base model with or without adapters, or a manager.
        limit_mb: limit for the pool's adapters on the device, in MB (10**6 bytes).
        host_limit_mb: limit for host memory in MB; 0 disables this cache.
        adapters: name -> folder or hub id, to register immediately.
        autocast_adapter_dtype: use float32 for adapters on a half-precision base, as ``load_adapter`` does; False
            halves their size.

    Raises:
        AdapterError: a limit is out of range, or the model has a pool already.
    """

    def __init__(
        self,
        model: nn.Module | AdapterManager,
        limit_mb: float,
        *,
        host_limit_mb: float = 1024.0,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        if not (_is_finite(limit_mb) and _is_finite(host_limit_mb) and limit_mb > 0 and host_limit_mb >= 0):
            raise AdapterError(f"a pool needs limit_mb > 0 and host_limit_mb >= 0, not {limit_mb} and {host_limit_mb}")
        self.manager, self._handle = _manager_and_handle(model)
        if self.manager.provider is not None:
            raise AdapterError("the model has an adapter pool already: close() that one first")
        half = not autocast_adapter_dtype
        self._reader = AdapterReader(self.manager, half=half)
        self._host = HostCache(int(host_limit_mb * MB), self._read)
        self._device = DeviceCache(self.manager, int(limit_mb * MB), self._host, half=half)
        self._sources: dict[str, AdapterSource] = {}
        self._releases = 0
        # Never wait for a transaction while this is locked: a running call may need the lock before it can end.
        self._lock = threading.Condition(threading.RLock())
        self._prefetcher: ThreadPoolExecutor | None = None
        self._hits = self._misses = 0
        self._closed = False
        for name, source in (adapters or {}).items():
            self.register(name, source)
        self.manager.provider = self

    # Properties

    @property
    def model(self) -> PeftModel:
        """A PeftModel whose calls and ``set_adapter`` accept the pool's names."""
        with self.manager.transaction(during_calls=True, quiet=True):
            if self._handle is None:
                self._handle = PeftModel.over(self.manager.model, self.manager)
            return self._handle

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order of registration."""
        return tuple(self._sources)

    @property
    def resident(self) -> tuple[str, ...]:
        """Adapters on the model, least recently used first."""
        with DeferredInterrupts(), self._lock:
            return self._device.names

    @property
    def on_host(self) -> tuple[str, ...]:
        """Adapters in host memory, least recently used first."""
        return self._host.names

    @property
    def offloaded_count(self) -> int:
        """Number of registered adapters that are not on the model."""
        with DeferredInterrupts(), self._lock:
            return len(self._sources) - len(self._device.names)

    def can_provide(self, name: str) -> bool:
        """Returns whether an adapter is registered."""
        return name in self._sources

    def config_of(self, name: str) -> AdapterConfig | None:
        """Returns the config of an adapter, which is read into host memory if it is neither there nor on the model.

        Args:
            name: name of the adapter.

        Returns:
            The config; None if no such adapter is registered.

        Raises:
            CheckpointError: the adapter cannot be read.
        """
        if name not in self._sources:
            return None
        return self.manager.configs.get(name) or self._host.get(name, prefetch=True).config

    @property
    def pinned(self) -> tuple[str, ...]:
        """Adapters that are pinned."""
        return tuple(name for name in self._sources if name in self._device.pinned)

    @property
    def statistics(self) -> PoolStatistics:
        """State and counters of the pool."""
        with DeferredInterrupts(), self._lock:
            return PoolStatistics(
                registered=len(self._sources),
                resident=len(self._device.names),
                on_host=len(self._host.names),
                device_bytes=self._device.byte_count,
                device_limit=self._device.limit,
                host_bytes=self._host.byte_count,
                host_limit=self._host.limit,
                hits=self._hits,
                misses=self._misses,
                host_hits=self._host.hits,
                reads=self._host.reads,
                read_bytes=self._host.read_bytes,
                evictions=self._device.evictions,
                swaps=self._device.swaps,
            )

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __repr__(self) -> str:
        return f"AdapterPool({self.statistics})"

    # Commands

    def register(self, name: str, source: str | os.PathLike[str], *, pinned: bool = False, **hub: Any) -> None:
        """Registers an adapter; nothing is read until it is needed.

        Args:
            name: name of the adapter.
            source: a folder or a hub id.
            pinned: load it now and never evict it.
            **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token``, …

        Raises:
            AdapterError: the name or the source is invalid.
            AdapterExistsError: the name is taken, in the pool or on the model.
        """
        self._check_open()
        check_name(name)
        if not isinstance(source, str | os.PathLike):
            raise AdapterError(f"adapter {name!r} needs a folder or a hub id, not {source!r:.60}", name=name)
        unknown = [key for key in hub if key not in HUB_OPTIONS]
        if unknown:
            raise AdapterError(f"unknown option {unknown[0]!r}." + did_you_mean(unknown[0], HUB_OPTIONS))
        with DeferredInterrupts(), self._lock:
            if name in self._sources or name in self.manager.configs:
                where = "pool" if name in self._sources else "model"
                raise AdapterExistsError(f"the {where} has an adapter {name!r} already; choose another name")
            self._sources[name] = AdapterSource(os.fspath(source), hub)
        if pinned:
            try:
                self.pin(name)
            except BaseException:
                self.unregister(name)
                raise

    def unregister(self, name: str) -> None:
        """Removes an adapter from the pool and from the model.

        Raises:
            BusyError: a running call uses the adapter.
        """
        self._known([name])
        with self.manager.transaction() as change, self._lock:
            if name in self._device.refs:
                raise BusyError(f"adapter {name!r} is in use by a running call")
            change.keep(self._sources)
            self._device.drop(name, change)
            del self._sources[name]
            self._host.drop(name)

    def pin(self, name: str) -> None:
        """Loads an adapter and protects it from eviction.

        Raises:
            AdapterError: it does not fit together with the others that cannot be evicted.
        """
        with self.provide(self._known([name])):
            self._device.pinned.add(name)

    def unpin(self, name: str) -> None:
        """Allows a pinned adapter to be evicted again."""
        self._device.pinned.difference_update(self._known([name]))

    def load(self, names: str | Sequence[str]) -> None:
        """Loads adapters onto the model, all or none, without activating them."""
        with self.hold(names):
            pass

    def hold(self, names: str | Sequence[str]) -> AbstractContextManager[None]:
        """Context manager: loads adapters and protects them from eviction while the block runs."""
        return self.provide(self._known([names] if isinstance(names, str) else names))

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Activates adapters, which remain frozen; previously active ones may be evicted for them."""
        self._check_open()
        self.manager.activate(names)

    def prefetch(self, names: str | Iterable[str], *, wait: bool = False) -> None:
        """Reads adapters into host memory in the background; the model is not changed.

        An error is raised when the adapter is used, or immediately with ``wait``.

        Args:
            names: names of the adapters, the most urgent first.
            wait: return only when all of them are read.
        """
        chosen = self._known([names] if isinstance(names, str) else names)
        waiting: list[Future[Any]] = []
        with DeferredInterrupts(), self._lock:
            if self._prefetcher is None:
                self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="adapter-pool")
            present = {*self._device.names, *self._host.names}
            absent = [name for name in chosen if name not in present]
            waiting.extend(self._prefetcher.submit(self._host.get, name, prefetch=True) for name in absent)
        if wait:
            for future in waiting:
                future.result()

    def close(self) -> None:
        """Closes the pool: resident adapters stay on the model, and host memory is freed."""
        if self._prefetcher is not None:
            self._prefetcher.shutdown(wait=True, cancel_futures=True)
        self._closed = True
        if self.manager.provider is self:
            self.manager.provider = None
        for name in self._host.names:
            self._host.drop(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Loading

    @contextmanager
    def provide(self, names: Sequence[str], *, switching: bool = False) -> Iterator[None]:
        """Context manager: loads registered adapters and protects them from eviction until the block ends.

        Args:
            names: names of adapters; those that are not registered are ignored.
            switching: the block activates them, so that the currently active adapters may be evicted. If one is,
                calls in other threads wait until the block ends.

        Raises:
            AdapterError: the adapters do not fit together.
            BusyError: they do not fit together with those that this thread already uses, or the thread is inside a
                call of the model.
            CheckpointError: an adapter cannot be read; nothing has changed then.
        """
        pooled = tuple(name for name in dict.fromkeys(names) if name in self._sources)
        if not pooled:
            yield
            return
        with ExitStack() as stack:
            stack.callback(self._notify_waiting)
            # Unlocking is a single step, which an interruption can neither prevent nor split.
            held = threading.Lock()
            held.acquire()
            stack.push(held.__exit__)
            self._load_and_hold(pooled, held, switching, stack)
            yield

    def _load_and_hold(self, names: tuple[str, ...], held: threading.Lock, switching: bool, stack: ExitStack) -> None:
        """Loads adapters and protects them as long as ``held`` is locked.

        With ``switching``, ``stack`` takes over the transaction in which active adapters were evicted.
        """
        read: dict[str, HostAdapter] = {}
        first = True
        while True:
            with DeferredInterrupts(), self._lock:
                missing = self._missing(names)
                if first:
                    self._hits += len(names) - len(missing)
                    self._misses += len(missing)
                    first = False
                if not missing and not (switching and self.manager.merged):
                    self._device.acquire(names, held)
                    return
            for name in missing:
                if name not in read:
                    read[name] = self._host.get(name)
            with ExitStack() as transaction:
                # The transaction is always entered before the lock, to prevent a deadlock.
                transaction.enter_context(self.manager.transaction())
                with DeferredInterrupts(), self._lock:
                    missing = self._missing(names)
                    if any(name not in read for name in missing):
                        continue
                    to_load = {name: read[name] for name in missing}
                    to_evict = self._device.to_evict(to_load, names, switching=switching)
                    releases = self._releases
                    if to_evict is not None:
                        self._device.swap_in(to_load, to_evict, switching=switching)
                        self._device.acquire(names, held)
                        if switching:
                            stack.push(transaction.pop_all())
                        return
            with DeferredInterrupts(), self._lock:
                if self._releases == releases:
                    self._lock.wait(_RETRY_SECONDS)

    def _notify_waiting(self) -> None:
        """Notifies threads that wait for memory."""
        with DeferredInterrupts(), self._lock:
            self._releases += 1
            self._lock.notify_all()

    def _missing(self, names: Iterable[str]) -> list[str]:
        self._check_open()
        missing = self._device.missing(names)
        self._known(missing)
        return missing

    def _read(self, name: str) -> HostAdapter:
        source = self._sources.get(name)
        if source is None:
            raise UnknownAdapterError(f"adapter {name!r} was removed from the pool", name=name)
        return self._reader.read(name, source)

    def _known(self, names: Iterable[str]) -> list[str]:
        self._check_open()
        chosen = list(names)
        for name in chosen:
            if name not in self._sources:
                raise UnknownAdapterError(
                    f"the pool has no adapter {name!r}." + did_you_mean(str(name), self._sources), name=name
                )
        return chosen

    def _check_open(self) -> None:
        self.manager.check_alive()
        if self._closed:
            raise AdapterError("this adapter pool is closed")


def _manager_and_handle(model: nn.Module | AdapterManager) -> tuple[AdapterManager, PeftModel | None]:
    if isinstance(model, AdapterManager):
        return AdapterManager.attach(model.model, model), None
    inner = unwrapped(model)
    if isinstance(inner, PeftModel):
        return inner.manager, inner
    return AdapterManager.attach(inner), None


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
