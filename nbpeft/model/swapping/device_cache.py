"""The pool's LRU cache of adapters on the model's device.

Used by :class:`~nbpeft.model.swapping.pool.AdapterPool`.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.hotswap import swap
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import AdapterError, AdapterExistsError, BusyError, few
from nbpeft.model.swapping.host_cache import HostAdapter, HostCache, ShapeSignature

MB = 10**6


@dataclass
class CacheEntry:
    """An adapter of the pool that is on the model.

    Attributes:
        config: the manager's config object, by which the adapter is recognized.
        signature: shapes of its tensors.
        byte_count: size of its tensors in bytes.
        version: sum of its tensors' versions, which changes when they are written to.
        norms: norms of its tensors when loaded, because fused and 8-bit optimizers do not change a tensor's version.
    """

    config: AdapterConfig
    signature: ShapeSignature
    byte_count: int
    version: int
    norms: Tensor


class DeviceCache:
    """LRU cache of the adapters on a model. Not thread-safe: the pool acquires its lock before calls.

    Args:
        manager: manager of the model.
        limit: maximal size in bytes.
        host: receives the evicted adapters.
        half: use the base's dtype for adapters even if it is a half-precision one.

    Attributes:
        pinned: names that are never evicted.
        evictions: number of evicted adapters.
        swaps: number of those that were overwritten in place.
    """

    def __init__(self, manager: AdapterManager, limit: int, host: HostCache, *, half: bool) -> None:
        self.limit = limit
        self.pinned: set[str] = set()
        self.evictions = 0
        self.swaps = 0
        self._manager = manager
        self._host = host
        self._half = half
        self._entries: OrderedDict[str, CacheEntry] = OrderedDict()
        self._leases: list[tuple[tuple[str, ...], int, weakref.ref[Any]]] = []
        self._scales: dict[str, float] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, least recently used first, without those deleted, replaced or renamed on the model."""
        configs = self._manager.configs
        for name in [name for name, entry in self._entries.items() if configs.get(name) is not entry.config]:
            del self._entries[name]
        return tuple(self._entries)

    @property
    def byte_count(self) -> int:
        """Size of all adapters in bytes."""
        return sum(entry.byte_count for entry in self._entries.values())

    def missing(self, names: Iterable[str]) -> list[str]:
        """Returns the names that are not on the model.

        Raises:
            AdapterExistsError: another adapter has taken the name on the model.
        """
        present = self.names
        missing = [name for name in names if name not in present]
        for name in missing:
            if name in self._manager.configs:
                raise AdapterExistsError(
                    f"the model now has an adapter {name!r} that is not from the pool: delete or rename it"
                )
        return missing

    @property
    def refs(self) -> dict[str, Counter[int]]:
        """Name -> thread id -> how many blocks of the thread currently use the adapter."""
        self._leases = [lease for lease in self._leases if (lock := lease[2]()) is not None and lock.locked()]
        found: dict[str, Counter[int]] = {}
        for names, thread, _ in self._leases:
            for name in names:
                found.setdefault(name, Counter())[thread] += 1
        return found

    def acquire(self, names: Iterable[str], held: threading.Lock) -> None:
        """Protects adapters from eviction by other threads, and marks them as just used.

        Args:
            names: adapters on the model.
            held: a locked lock; the adapters are protected until it is unlocked or garbage collected.
        """
        for name in names:
            self._entries.move_to_end(name)
        # Weakly: if an interruption skips the end of the block, the lock is deleted with the frame of the block.
        self._leases.append((tuple(names), threading.get_ident(), weakref.ref(held)))

    def to_evict(
        self, to_load: Mapping[str, HostAdapter], names: Sequence[str], *, switching: bool
    ) -> list[str] | None:
        """Returns the adapters to evict before loading others; None if other threads use too many.

        Args:
            to_load: the adapters to load.
            names: all adapters that are needed on the model, including ``to_load``.
            switching: whether the active adapters may be evicted.

        Raises:
            AdapterError: the adapters can never fit.
            BusyError: they do not fit together with those that this thread uses.
        """
        refs = self.refs
        loaded_bytes = sum(adapter.byte_count for adapter in to_load.values())
        over = self.byte_count + loaded_bytes - self.limit
        used_here = [name for name, threads in refs.items() if threads[threading.get_ident()]]
        not_evicted = {*names, *self.pinned, *used_here, *(() if switching else self._manager.active)}
        evicted: list[str] = []
        used_by_others: list[str] = []
        for name in self.names:
            if over <= 0:
                break
            if name in not_evicted or self._changed(name):
                continue
            if name in refs:
                used_by_others.append(name)
                continue
            evicted.append(name)
            over -= self._entries[name].byte_count
        if over <= 0:
            return evicted
        if over > sum(self._entries[name].byte_count for name in used_by_others):
            raise self._no_room(names, loaded_bytes, AdapterError)
        if used_here:
            raise self._no_room(names, loaded_bytes, BusyError)
        return None

    def _no_room(
        self, names: Sequence[str], loaded_bytes: int, kind: type[AdapterError] | type[BusyError]
    ) -> AdapterError | BusyError:
        wanted = loaded_bytes + sum(self._entries[name].byte_count for name in names if name in self._entries)
        others = [
            f"{name!r} ({reason})" for name in self._entries if name not in names and (reason := self._why_kept(name))
        ]
        kept = f" in addition to {few(others, 4, quoted=False)}" if others else ""
        return kind(
            f"{few(names, 4)} take {wanted / MB:.3f} MB and do not fit into the pool's {self.limit / MB:.3f} MB{kept}",
            wanted=wanted,
            limit=self.limit,
        )

    def _why_kept(self, name: str) -> str:
        """Returns why an adapter is not evicted, or the empty string if it can be."""
        if name in self.pinned:
            return "pinned"
        if name in self.refs:
            return "in use"
        if self._changed(name):
            return "changed since it was loaded"
        return "active" if name in self._manager.active else ""

    # Changes of the model, always inside one of the manager's transactions

    @torch.inference_mode(False)
    @torch.no_grad()
    def swap_in(self, to_load: Mapping[str, HostAdapter], evicted: Sequence[str], *, switching: bool = False) -> None:
        """Evicts adapters and loads others instead; all or nothing.

        Args:
            to_load: the adapters to load.
            evicted: the adapters to evict.
            switching: whether other adapters are activated in the same transaction, so that merged ones are unmerged.

        Raises:
            MergeError: adapters are merged and remain active.
        """
        overwritten, added = self._matched(to_load, evicted)
        plans = {name: self._manager.plan(to_load[name].config, is_new=False) for name in added}
        copies = {name: copied for name in evicted if (copied := self._copied(name)) is not None}
        with self._manager.transaction() as change:
            change.on_undo(lambda: self._mark_unchanged(evicted))
            change.keep(self._entries)
            if to_load and self._manager.merged:
                if not switching:
                    self._manager.refuse_merged(f"loading {', '.join(map(repr, to_load))} onto the model")
                warnings.warn("adapters are merged: they are unmerged before another is activated", stacklevel=4)
                self._manager.unmerge()
            for old in evicted:
                if old not in overwritten:
                    self._manager.remove(old)
                    del self._entries[old]
            for old, new in overwritten.items():
                self._overwrite(old, new, to_load[new])
            for name, plan in plans.items():
                self._add(name, plan, to_load[name])
        self.evictions += len(evicted)
        self.swaps += len(overwritten)
        for name, adapter in to_load.items():
            self._host.drop(name)
            if adapter.note is not None:
                warnings.warn(f"{name}: {adapter.note}", stacklevel=2)
        for name, copied in copies.items():
            self._host.put(name, copied)

    def _mark_unchanged(self, names: Iterable[str]) -> None:
        """Treats the tensors of adapters as unchanged, after a transaction wrote and restored them."""
        for name in names:
            self._entries[name].version = self._version(name)

    def _matched(self, to_load: Mapping[str, HostAdapter], evicted: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        """Returns evicted adapter -> new adapter of its signature that overwrites it, and the other new adapters."""
        added = list(to_load)
        overwritten: dict[str, str] = {}
        for old in evicted:
            signature = self._entries[old].signature
            alike = (name for name in added if signature.can_overwrite and to_load[name].signature == signature)
            new = next(alike, None)
            if new is not None:
                overwritten[old] = new
                added.remove(new)
        return overwritten, added

    def _copied(self, name: str) -> HostAdapter | None:
        """Copies an adapter to host memory; None if it exceeds the limit."""
        entry = self._entries[name]
        self._scales[name] = self._manager.scale(name)
        if entry.byte_count > self._host.limit:
            return None
        return HostAdapter(entry.config, self._manager.weights(name).copied("cpu"), entry.signature)

    def _overwrite(self, old: str, new: str, adapter: HostAdapter) -> None:
        self._manager.rename(old, new)
        del self._entries[old]
        swap(self._manager, new, adapter.config, adapter.weights)
        for parameter in self._manager.parameters(new):
            parameter.grad = None
        self._record(new, adapter)

    def _add(self, name: str, plan: InjectionPlan, adapter: HostAdapter) -> None:
        # A copy, because tensors on the model will be overwritten, and other threads may use what was read.
        weights = adapter.weights.copied("cpu")
        self._manager.add(name, plan, weights, trainable=False, half=self._half, select=False)
        self._record(name, adapter)

    def _record(self, name: str, adapter: HostAdapter) -> None:
        manager = self._manager
        if name not in manager.frozen:
            manager.freeze(name)
        scale = self._scales.get(name, 1.0)
        if manager.scale(name) != scale:
            manager.set_scale(name, scale)
        self._entries[name] = CacheEntry(
            manager.configs[name], adapter.signature, self._bytes(name), self._version(name), self._norms(name)
        )

    def _bytes(self, name: str) -> int:
        """Returns the size of an adapter on the model in bytes."""
        tensors: dict[int, Tensor] = {id(parameter): parameter for parameter in self._manager.parameters(name)}
        weights = self._manager.weights(name)
        for named in (*weights.copies.values(), weights.shared):
            tensors.update((id(tensor), tensor) for tensor in named.values())
        return sum(tensor.nbytes for tensor in tensors.values())

    def drop(self, name: str, change: Transaction) -> None:
        """Removes an adapter from the model, if it is there.

        Args:
            name: name of the adapter.
            change: transaction that records the change.
        """
        change.keep(self._entries)
        change.keep_attributes(self, "pinned", "_scales")
        if name in self.names:
            self._manager.remove(name)
            del self._entries[name]
        self.pinned.discard(name)
        self._scales.pop(name, None)

    def _version(self, name: str) -> int:
        return sum(parameter._version for parameter in self._manager.parameters(name))

    def _norms(self, name: str) -> Tensor:
        """Returns the norm of each parameter, (parameters,), on the CPU."""
        norms = torch._foreach_norm([parameter.detach() for parameter in self._manager.parameters(name)])
        return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).nan_to_num().cpu()

    def _changed(self, name: str) -> bool:
        entry = self._entries[name]
        return self._version(name) != entry.version or not torch.equal(self._norms(name), entry.norms)
