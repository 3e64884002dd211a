"""AdapterPool: more adapters on one base model than fit on its device.

    files        every registered adapter, by folder or hub id
    host memory  what was read ahead or pushed out, within a bound of its own
    device       the adapters used last, within a bound; the only ones the model knows

Calls name adapters as always (``set_adapter``, ``adapter_names=[…]``) and the pool brings what is
missing. Room is made by the least recently used; an adapter of the same structure is overwritten in
place, so that a miss costs a file read and one copy of its tensors. Files are read without
holding anybody up; the model changes only between calls, behind its switch.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from torch import nn

from nbpeft.engine.holder import check_name
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.model_tree import unwrapped
from nbpeft.errors import AdapterError, AdapterExistsError, BusyError, UnknownAdapterError, did_you_mean
from nbpeft.interrupts import HeldInterrupts
from nbpeft.model.files import HUB_OPTIONS
from nbpeft.model.peft_model import PeftModel
from nbpeft.model.pool_files import HostCache, Place, Reader, Ready
from nbpeft.model.pool_residents import MB, PoolStatistics, Residents

_RETRY = 1.0
"""Seconds after which one that waits for room looks again, whatever it was told."""


class AdapterPool:
    """Keeps the adapters used last on the model and brings others when they are named.

    Adapters of a pool are frozen. One that is pinned, active, used by a running call, or changed
    since it was loaded is never pushed out. Adapters that were put on the model by other means
    stay there and do not count. Of a folder that is written anew the pool goes on serving what it
    read, until the adapter is unregistered and registered again.

    Args:
        model: a PeftModel, a base model with or without adapters, or a manager.
        limit_mb: most MB (10**6 bytes) that the pool's adapters take on the device.
        host_limit_mb: the same for host memory; 0 keeps nothing there.
        adapters: name -> folder or hub id, to register at once.
        autocast_adapter_dtype: keep adapters in float32 on a half-precision base, as
            ``load_adapter`` does; False halves what they take.

    Raises:
        AdapterError: a limit makes no sense, or the model has a pool already.
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
        if self.manager.supplier is not None:
            raise AdapterError("the model has an adapter pool already: close() that one first")
        half = not autocast_adapter_dtype
        self._reader = Reader(self.manager, half=half)
        self._host = HostCache(int(host_limit_mb * MB), self._read)
        self._residents = Residents(self.manager, int(limit_mb * MB), self._host, half=half)
        self._places: dict[str, Place] = {}
        self._releases = 0
        # Never wait for the switch while holding it: a running call may need it to end.
        self._lock = threading.Condition(threading.RLock())
        self._ahead: ThreadPoolExecutor | None = None
        self._hits = self._misses = 0
        self._closed = False
        for name, source in (adapters or {}).items():
            self.register(name, source)
        self.manager.supplier = self

    # What there is

    @property
    def model(self) -> PeftModel:
        """A handle on the model whose calls and ``set_adapter`` take the pool's names."""
        with self.manager.transaction(during_calls=True, quiet=True):
            if self._handle is None:
                self._handle = PeftModel.over(self.manager.model, self.manager)
            return self._handle

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order they were registered."""
        return tuple(self._places)

    @property
    def resident(self) -> tuple[str, ...]:
        """Adapters on the model, least recently used first."""
        with HeldInterrupts(), self._lock:
            return self._residents.names

    @property
    def on_host(self) -> tuple[str, ...]:
        """Adapters in host memory, least recently used first."""
        return self._host.names

    @property
    def waiting_count(self) -> int:
        """How many registered adapters are not on the model."""
        with HeldInterrupts(), self._lock:
            return len(self._places) - len(self._residents.names)

    def knows(self, name: str) -> bool:
        """Whether an adapter is registered."""
        return name in self._places

    @property
    def pinned(self) -> tuple[str, ...]:
        """Adapters that stay resident."""
        return tuple(name for name in self._places if name in self._residents.pinned)

    @property
    def statistics(self) -> PoolStatistics:
        """What the pool holds and has done."""
        with HeldInterrupts(), self._lock:
            return PoolStatistics(
                registered=len(self._places),
                resident=len(self._residents.names),
                on_host=len(self._host.names),
                device_bytes=self._residents.byte_count,
                device_limit=self._residents.limit,
                host_bytes=self._host.byte_count,
                host_limit=self._host.limit,
                hits=self._hits,
                misses=self._misses,
                host_hits=self._host.hits,
                reads=self._host.reads,
                read_bytes=self._host.read_bytes,
                evictions=self._residents.evictions,
                swaps=self._residents.swaps,
            )

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

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
            AdapterError: the name is none or the source no place.
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
            if name in self._places or name in self.manager.configs:
                where = "pool" if name in self._places else "model"
                raise AdapterExistsError(f"the {where} has an adapter {name!r} already; take another name")
            self._places[name] = Place(os.fspath(source), hub)
        if pinned:
            try:
                self.pin(name)
            except BaseException:
                self.unregister(name)
                raise

    def unregister(self, name: str) -> None:
        """Forgets an adapter and takes it off the model.

        Raises:
            BusyError: a running call uses it.
        """
        self._known([name])
        with self.manager.transaction() as change, self._lock:
            if name in self._residents.leases:
                raise BusyError(f"adapter {name!r} is in use by a running call")
            change.keep(self._places)
            self._residents.drop(name, change)
            del self._places[name]
            self._host.drop(name)

    def pin(self, name: str) -> None:
        """Loads an adapter and keeps it resident.

        Raises:
            AdapterError: it does not fit beside the others that have to stay.
        """
        with self.supply(self._known([name])):
            self._residents.pinned.add(name)

    def unpin(self, name: str) -> None:
        """Lets a pinned adapter go when room is needed."""
        self._residents.pinned.difference_update(self._known([name]))

    def load(self, names: str | Sequence[str]) -> None:
        """Makes adapters resident, all together or none, without making them active."""
        with self.hold(names):
            pass

    def hold(self, names: str | Sequence[str]) -> AbstractContextManager[None]:
        """Keeps adapters resident while the block runs."""
        return self.supply(self._known([names] if isinstance(names, str) else names))

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Makes adapters the active ones, frozen as they are; other active ones may be pushed out for them."""
        self._check_open()
        self.manager.activate(names)

    def prefetch(self, names: str | Iterable[str], *, wait: bool = False) -> None:
        """Reads adapters into host memory in the background; the model is not touched.

        A failure is told when the adapter is used, or now with ``wait``.

        Args:
            names: which ones, the most urgent first.
            wait: come back only when all are there.
        """
        chosen = self._known([names] if isinstance(names, str) else names)
        waiting: list[Future[Any]] = []
        with HeldInterrupts(), self._lock:
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(1, thread_name_prefix="adapter-pool")
            present = {*self._residents.names, *self._host.names}
            absent = [name for name in chosen if name not in present]
            waiting.extend(self._ahead.submit(self._host.get, name, ahead=True) for name in absent)
        if wait:
            for future in waiting:
                future.result()

    def close(self) -> None:
        """Ends the pool: what is resident stays on the model, the rest of the memory is given back."""
        if self._ahead is not None:
            self._ahead.shutdown(wait=True, cancel_futures=True)
        self._closed = True
        if self.manager.supplier is self:
            self.manager.supplier = None
        for name in self._host.names:
            self._host.drop(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Having adapters on the model

    @contextmanager
    def supply(self, names: Sequence[str], *, switching: bool = False) -> Iterator[None]:
        """Has those of the adapters that the pool knows on the model, all together, until the block ends.

        Args:
            names: adapters; others are left alone.
            switching: the block makes them the active ones. Active ones may then be pushed out; where that
                is done, no call of another thread runs before the block ends.

        Raises:
            AdapterError: they do not fit together.
            BusyError: they do not fit beside what this thread already holds, or the thread is inside
                a call of the model.
            CheckpointError: one cannot be read; nothing has changed then.
        """
        pooled = tuple(name for name in dict.fromkeys(names) if name in self._places)
        if not pooled:
            yield
            return
        with ExitStack() as stack:
            stack.callback(self._released)
            # Unlocking is one step, which no interruption can keep from happening or split.
            held = threading.Lock()
            held.acquire()
            stack.push(held.__exit__)
            self._take(pooled, held, switching, stack)
            yield

    def _take(self, names: tuple[str, ...], held: threading.Lock, switching: bool, stack: ExitStack) -> None:
        """Keeps adapters resident, as long as a lock is locked, once all are; ``stack`` keeps the switch if need be."""
        arrivals: dict[str, Ready] = {}
        first = True
        while True:
            with HeldInterrupts(), self._lock:
                missing = self._missing(names)
                if first:
                    self._hits += len(names) - len(missing)
                    self._misses += len(missing)
                    first = False
                if not missing and not (switching and self.manager.merged):
                    self._residents.lease(names, held)
                    return
            for name in missing:
                if name not in arrivals:
                    arrivals[name] = self._host.get(name)
            with ExitStack() as gate:
                # The transaction before the lock, in this order everywhere.
                gate.enter_context(self.manager.transaction())
                with HeldInterrupts(), self._lock:
                    missing = self._missing(names)
                    if any(name not in arrivals for name in missing):
                        continue
                    coming = {name: arrivals[name] for name in missing}
                    victims = self._residents.victims(coming, names, switching=switching)
                    releases = self._releases
                    if victims is not None:
                        self._residents.exchange(coming, victims, switching=switching)
                        self._residents.lease(names, held)
                        if switching:
                            stack.push(gate.pop_all())
                        return
            with HeldInterrupts(), self._lock:
                if self._releases == releases:
                    self._lock.wait(_RETRY)

    def _released(self) -> None:
        """Tells those that wait for room that there may be some."""
        with HeldInterrupts(), self._lock:
            self._releases += 1
            self._lock.notify_all()

    def _missing(self, names: Iterable[str]) -> list[str]:
        self._check_open()
        missing = self._residents.missing(names)
        self._known(missing)
        return missing

    # Small questions

    def _read(self, name: str) -> Ready:
        place = self._places.get(name)
        if place is None:
            raise UnknownAdapterError(f"adapter {name!r} was taken out of the pool", name=name)
        return self._reader.read(name, place)

    def _known(self, names: Iterable[str]) -> list[str]:
        self._check_open()
        chosen = list(names)
        for name in chosen:
            if name not in self._places:
                raise UnknownAdapterError(
                    f"the pool has no adapter {name!r}." + did_you_mean(str(name), self._places), name=name
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
