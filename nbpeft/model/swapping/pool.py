"""AdapterPool: more adapters on one base model than fit on its device.

    files        every registered adapter, by folder or hub id
    host memory  what was prefetched or evicted, an LRU cache with a limit of its own
    device       the adapters used last, an LRU cache; the only ones the model knows

Calls name adapters as always (``set_adapter``, ``adapter_names=[…]``) and the pool loads what is
missing. The least recently used adapters are evicted; one of the same shapes is overwritten in
place, so that a miss costs a file read and one copy of its tensors. Files are read without
blocking other threads; the model changes only between calls, in a transaction of its manager.
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

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import unwrapped
from nbpeft.errors import AdapterError, AdapterExistsError, BusyError, UnknownAdapterError, did_you_mean
from nbpeft.model.handle.peft_model import PeftModel
from nbpeft.model.saving.files import HUB_OPTIONS
from nbpeft.model.swapping.device_cache import MB, DeviceCache
from nbpeft.model.swapping.host_cache import AdapterReader, AdapterSource, HostAdapter, HostCache

_RETRY_SECONDS = 1.0
"""After which a thread that waits for room looks again, whether it was notified or not."""


@dataclass(frozen=True)
class PoolStatistics:
    """What a pool holds and has done.

    Attributes:
        registered: adapters it knows.
        resident: adapters on the model's device.
        on_host: adapters in host memory only.
        device_bytes: bytes of the resident ones.
        device_limit: limit on them.
        host_bytes: bytes of those in host memory.
        host_limit: limit on them.
        hits: requests for an adapter that was resident.
        misses: requests for one that was not.
        host_hits: misses that were served from host memory, or by a read already running.
        reads: adapters read from files.
        read_bytes: bytes of their tensors.
        evictions: adapters evicted from the device.
        swaps: of the evictions, those overwritten in place.
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
        """Share of the requests that found the adapter resident; 1 before the first."""
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
    """Keeps the adapters used last on the model and loads others when they are named.

    Adapters of a pool are frozen. One that is pinned, active, used by a running call, or changed
    since it was loaded is never evicted. Adapters that were added to the model by other means
    stay there and do not count. If an adapter's folder changes, the pool goes on serving what it
    has read, until the adapter is unregistered and registered again.

    Args:
        model: a PeftModel, a base model with or without adapters, or a manager.
        limit_mb: limit in MB (10**6 bytes) on the pool's adapters on the device.
        host_limit_mb: the same for host memory; 0 keeps nothing there.
        adapters: name -> folder or hub id, to register at once.
        autocast_adapter_dtype: keep adapters in float32 on a half-precision base, as
            ``load_adapter`` does; False halves what they take.

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
        # Never wait for a transaction while holding it: a running call may need it to end.
        self._lock = threading.Condition(threading.RLock())
        self._prefetcher: ThreadPoolExecutor | None = None
        self._hits = self._misses = 0
        self._closed = False
        for name, source in (adapters or {}).items():
            self.register(name, source)
        self.manager.provider = self

    # What there is

    @property
    def model(self) -> PeftModel:
        """A handle on the model whose calls and ``set_adapter`` accept the pool's names."""
        with self.manager.transaction(during_calls=True, quiet=True):
            if self._handle is None:
                self._handle = PeftModel.over(self.manager.model, self.manager)
            return self._handle

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order they were registered."""
        return tuple(self._sources)

    @property
    def resident(self) -> tuple[str, ...]:
        """Adapters on the model, least recently used first."""
        with HeldInterrupts(), self._lock:
            return self._device.names

    @property
    def on_host(self) -> tuple[str, ...]:
        """Adapters in host memory, least recently used first."""
        return self._host.names

    @property
    def offloaded_count(self) -> int:
        """How many registered adapters are not on the model."""
        with HeldInterrupts(), self._lock:
            return len(self._sources) - len(self._device.names)

    def can_provide(self, name: str) -> bool:
        """Whether an adapter is registered."""
        return name in self._sources

    @property
    def pinned(self) -> tuple[str, ...]:
        """Adapters that stay resident."""
        return tuple(name for name in self._sources if name in self._device.pinned)

    @property
    def statistics(self) -> PoolStatistics:
        """What the pool holds and has done."""
        with HeldInterrupts(), self._lock:
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
        """Makes an adapter known; nothing is read until it is needed.

        Args:
            name: its name.
            source: a folder or a hub id.
            pinned: load it now and keep it resident.
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
        with HeldInterrupts(), self._lock:
            if name in self._sources or name in self.manager.configs:
                where = "pool" if name in self._sources else "model"
                raise AdapterExistsError(f"the {where} has an adapter {name!r} already; take another name")
            self._sources[name] = AdapterSource(os.fspath(source), hub)
        if pinned:
            try:
                self.pin(name)
            except BaseException:
                self.unregister(name)
                raise

    def unregister(self, name: str) -> None:
        """Forgets an adapter and removes it from the model.

        Raises:
            BusyError: a running call uses it.
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
        """Loads an adapter and keeps it resident.

        Raises:
            AdapterError: it does not fit beside the others that have to stay.
        """
        with self.provide(self._known([name])):
            self._device.pinned.add(name)

    def unpin(self, name: str) -> None:
        """Lets a pinned adapter be evicted again."""
        self._device.pinned.difference_update(self._known([name]))

    def load(self, names: str | Sequence[str]) -> None:
        """Loads adapters onto the model, all or none, without activating them."""
        with self.hold(names):
            pass

    def hold(self, names: str | Sequence[str]) -> AbstractContextManager[None]:
        """Context manager: keeps adapters resident while the block runs."""
        return self.provide(self._known([names] if isinstance(names, str) else names))

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Activates adapters, which stay frozen; those active before may be evicted for them."""
        self._check_open()
        self.manager.activate(names)

    def prefetch(self, names: str | Iterable[str], *, wait: bool = False) -> None:
        """Reads adapters into host memory in the background; the model is not touched.

        A failure is raised when the adapter is used, or now with ``wait``.

        Args:
            names: which ones, the most urgent first.
            wait: return only when all are there.
        """
        chosen = self._known([names] if isinstance(names, str) else names)
        waiting: list[Future[Any]] = []
        with HeldInterrupts(), self._lock:
            if self._prefetcher is None:
                self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="adapter-pool")
            present = {*self._device.names, *self._host.names}
            absent = [name for name in chosen if name not in present]
            waiting.extend(self._prefetcher.submit(self._host.get, name, prefetch=True) for name in absent)
        if wait:
            for future in waiting:
                future.result()

    def close(self) -> None:
        """Closes the pool: what is resident stays on the model, the rest of the memory is freed."""
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
        """Context manager: loads those of the adapters that are registered and keeps them until the block ends.

        Args:
            names: adapters; those that the pool does not know are ignored.
            switching: the block makes them the active ones, so that those active now may be evicted. If one is,
                no call of another thread runs before the block ends.

        Raises:
            AdapterError: they do not fit together.
            BusyError: they do not fit beside what this thread already holds, or the thread is inside
                a call of the model.
            CheckpointError: one cannot be read; nothing has changed then.
        """
        pooled = tuple(name for name in dict.fromkeys(names) if name in self._sources)
        if not pooled:
            yield
            return
        with ExitStack() as stack:
            stack.callback(self._notify_waiting)
            # Unlocking is one step, which no interruption can keep from happening or split.
            held = threading.Lock()
            held.acquire()
            stack.push(held.__exit__)
            self._load_and_hold(pooled, held, switching, stack)
            yield

    def _load_and_hold(self, names: tuple[str, ...], held: threading.Lock, switching: bool, stack: ExitStack) -> None:
        """Loads adapters and keeps them as long as ``held`` is locked.

        With ``switching``, ``stack`` takes over the transaction in which active adapters were evicted.
        """
        read: dict[str, HostAdapter] = {}
        first = True
        while True:
            with HeldInterrupts(), self._lock:
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
                # The transaction before the lock, in this order everywhere.
                transaction.enter_context(self.manager.transaction())
                with HeldInterrupts(), self._lock:
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
            with HeldInterrupts(), self._lock:
                if self._releases == releases:
                    self._lock.wait(_RETRY_SECONDS)

    def _notify_waiting(self) -> None:
        """Notifies threads that wait for room."""
        with HeldInterrupts(), self._lock:
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
            raise UnknownAdapterError(f"adapter {name!r} was taken out of the pool", name=name)
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
