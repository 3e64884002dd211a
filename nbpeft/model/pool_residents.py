"""The adapters of a pool that are on its model: what they take, what may go, and exchanging them."""

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

from nbpeft.engine.adapter import AdapterConfig
from nbpeft.engine.hotswap import swap
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.plan import InjectionPlan
from nbpeft.engine.transaction import Transaction
from nbpeft.errors import AdapterError, AdapterExistsError, BusyError
from nbpeft.model.pool_files import HostCache, Ready, Structure, copied_out

MB = 10**6


@dataclass(frozen=True)
class PoolStatistics:
    """What a pool holds and has done.

    Attributes:
        registered: adapters it knows.
        resident: adapters on the model's device.
        on_host: adapters in host memory only.
        device_bytes: bytes of the resident ones.
        device_limit: bound on them.
        host_bytes: bytes of those in host memory.
        host_limit: bound on them.
        hits: times that an adapter was asked for and was resident.
        misses: times that it was not.
        host_hits: misses that were served from host memory, or by a read under way.
        reads: adapters read from files.
        read_bytes: bytes of their tensors.
        evictions: adapters pushed out.
        swaps: of the misses, those that overwrote another adapter in place.
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
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    def __str__(self) -> str:
        return (
            f"{self.resident} of {self.registered} adapters resident "
            f"({self.device_bytes / MB:.1f} of {self.device_limit / MB:.1f} MB), {self.on_host} in host memory "
            f"({self.host_bytes / MB:.1f} of {self.host_limit / MB:.1f} MB), {self.hit_rate:.0%} hits, "
            f"{self.evictions} evictions"
        )


@dataclass
class Resident:
    """An adapter of the pool that is on the model.

    Attributes:
        config: the manager's own object, by which it is known again.
        structure: which tensors it has.
        byte_count: bytes they take.
        version: changes when they are written to.
        norms: theirs as they were loaded; fused and 8-bit optimizers write without changing a version.
    """

    config: AdapterConfig
    structure: Structure
    byte_count: int
    version: int
    norms: Tensor


class Residents:
    """The resident adapters, least recently used first. Not safe in itself: the pool holds its lock.

    Args:
        manager: of the model.
        limit: most bytes.
        host: where those go that have to make room.
        half: keep adapters in the base's dtype also where that is a half one.

    Attributes:
        pinned: names that never go.
        evictions: adapters pushed out so far.
        swaps: those of them that were overwritten in place.
    """

    def __init__(self, manager: AdapterManager, limit: int, host: HostCache, *, half: bool) -> None:
        self.limit = limit
        self.pinned: set[str] = set()
        self.evictions = 0
        self.swaps = 0
        self._manager = manager
        self._host = host
        self._half = half
        self._records: OrderedDict[str, Resident] = OrderedDict()
        self._leases: list[tuple[tuple[str, ...], int, weakref.ref[Any]]] = []
        self._scales: dict[str, float] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """What is resident; adapters that others deleted, replaced or renamed on the model are forgotten."""
        configs = self._manager.configs
        for name in [name for name, record in self._records.items() if configs.get(name) is not record.config]:
            del self._records[name]
        return tuple(self._records)

    @property
    def byte_count(self) -> int:
        """Bytes of all of them."""
        return sum(record.byte_count for record in self._records.values())

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are not resident.

        Raises:
            AdapterExistsError: another adapter has taken the name on the model.
        """
        present = self.names
        missing = [name for name in names if name not in present]
        for name in missing:
            if name in self._manager.configs:
                raise AdapterExistsError(
                    f"the model has another adapter {name!r} now, which is not the pool's: delete or rename that one"
                )
        return missing

    @property
    def leases(self) -> dict[str, Counter[int]]:
        """Name -> thread -> how often it holds the name now."""
        self._leases = [lease for lease in self._leases if (held := lease[2]()) is not None and held.locked()]
        found: dict[str, Counter[int]] = {}
        for names, thread, _ in self._leases:
            for name in names:
                found.setdefault(name, Counter())[thread] += 1
        return found

    def lease(self, names: Iterable[str], held: threading.Lock) -> None:
        """Keeps adapters for the calling thread, and counts them as used just now.

        Args:
            names: resident adapters.
            held: a lock; they are kept as long as it exists and is locked.
        """
        for name in names:
            self._records.move_to_end(name)
        self._leases.append((tuple(names), threading.get_ident(), weakref.ref(held)))

    def victims(self, arrivals: Mapping[str, Ready], names: Sequence[str], *, switching: bool) -> list[str] | None:
        """What has to go for arrivals; None if only other threads' leases are in the way.

        Args:
            arrivals: what comes.
            names: what has to be resident then, the arrivals among it.
            switching: whether the active adapters may go.

        Raises:
            AdapterError: there can be no room.
            BusyError: there is none beside what this thread holds.
        """
        coming = sum(ready.byte_count for ready in arrivals.values())
        over = self.byte_count + coming - self.limit
        held = [name for name, threads in self.leases.items() if threads[threading.get_ident()]]
        stays = {*names, *self.pinned, *held, *(() if switching else self._manager.active)}
        victims: list[str] = []
        leased: list[str] = []
        for name in self.names if over > 0 else ():
            if over <= 0:
                break
            if name in stays or self._changed(name):
                continue
            if name in self.leases:
                leased.append(name)
                continue
            victims.append(name)
            over -= self._records[name].byte_count
        if over <= 0:
            return victims
        if over > sum(self._records[name].byte_count for name in leased):
            raise self._no_room(names, coming, AdapterError)
        if held:
            raise self._no_room(names, coming, BusyError)
        return None

    def _no_room(
        self, names: Sequence[str], coming: int, kind: type[AdapterError] | type[BusyError]
    ) -> AdapterError | BusyError:
        wanted = coming + sum(self._records[name].byte_count for name in names if name in self._records)
        others = [
            f"{name!r} ({reason})" for name in self._records if name not in names and (reason := self._reason(name))
        ]
        beside = f" beside {', '.join(others[:4])}{' …' if len(others) > 4 else ''}" if others else ""
        asked = f"{', '.join(map(repr, names[:4]))}{' …' if len(names) > 4 else ''}"
        return kind(
            f"{asked} take {wanted / MB:.3f} MB and do not fit into the pool's {self.limit / MB:.3f} MB{beside}",
            wanted=wanted,
            limit=self.limit,
        )

    def _reason(self, name: str) -> str:
        """Why an adapter stays; empty if it may go."""
        if name in self.pinned:
            return "pinned"
        if name in self.leases:
            return "in use"
        if self._changed(name):
            return "changed since it was loaded"
        return "active" if name in self._manager.active else ""

    # Changing the model; all of it behind the switch

    @torch.inference_mode(False)
    @torch.no_grad()
    def exchange(self, arrivals: Mapping[str, Ready], victims: Sequence[str], *, switching: bool = False) -> None:
        """Puts the arrivals on the model in the place of the victims; all or nothing.

        Args:
            arrivals: what comes.
            victims: what goes.
            switching: whether other adapters are made active with it, so that what is merged is unmerged.

        Raises:
            MergeError: adapters are merged and stay active.
        """
        pairs, alone = self._paired(arrivals, victims)
        plans = {name: self._manager.plan(arrivals[name].config) for name in alone}
        gone = {old: self._copied(old) for old in victims}
        with self._manager.transaction() as change:
            change.on_undo(lambda: self._unchanged(victims))
            change.keep(self._records)
            if arrivals and self._manager.merged:
                self._unmerge(arrivals, switching)
            for old in victims:
                if old not in pairs:
                    self._manager.remove(old)
                    del self._records[old]
            for old, new in pairs.items():
                self._overwrite(old, new, arrivals[new])
            for name, plan in plans.items():
                self._put_in(name, plan, arrivals[name])
        self.evictions += len(victims)
        self.swaps += len(pairs)
        for name, ready in arrivals.items():
            self._host.drop(name)
            if ready.note is not None:
                warnings.warn(f"{name}: {ready.note}", stacklevel=2)
        for old, copied in gone.items():
            if copied is not None:
                self._host.put(old, copied)

    def _unmerge(self, arrivals: Iterable[str], switching: bool) -> None:
        """Brings the frozen weights back, for adapters that are to become active."""
        if not switching:
            self._manager.refuse_merged(f"{', '.join(map(repr, arrivals))} can be brought onto the model")
        warnings.warn("adapters are merged: unmerging before another is activated", stacklevel=5)
        self._manager.unmerge()

    def _unchanged(self, names: Iterable[str]) -> None:
        """Takes the tensors of adapters, which were written and put back, for those that were loaded."""
        for name in names:
            self._records[name].version = self._version(name)

    def _paired(self, arrivals: Mapping[str, Ready], victims: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        """Victim -> the arrival of its structure that overwrites it, and the arrivals without one."""
        waiting = list(arrivals)
        pairs: dict[str, str] = {}
        for old in victims:
            structure = self._records[old].structure
            new = next((name for name in waiting if arrivals[name].structure == structure), None)
            if new is not None:
                pairs[old] = new
                waiting.remove(new)
        return pairs, waiting

    def _copied(self, name: str) -> Ready | None:
        """An adapter that is about to go, copied to host memory if it may stay there."""
        record = self._records[name]
        self._scales[name] = self._manager.scale(name)
        if record.byte_count > self._host.limit:
            return None
        return Ready(record.config, copied_out(self._manager.weights(name)), record.structure, record.byte_count)

    def _overwrite(self, old: str, new: str, ready: Ready) -> None:
        self._manager.rename(old, new)
        del self._records[old]
        swap(self._manager, new, ready.config, ready.weights)
        for parameter in self._manager.parameters(new):
            parameter.grad = None
        self._settle(new, ready)

    def _put_in(self, name: str, plan: InjectionPlan, ready: Ready) -> None:
        # A copy: what is on the model will be overwritten, and others may hold what was read.
        weights = copied_out(ready.weights)
        self._manager.add(name, plan, weights, trainable=False, half=self._half, select=False)
        self._settle(name, ready)

    def _settle(self, name: str, ready: Ready) -> None:
        manager = self._manager
        if name not in manager.frozen:
            manager.freeze(name)
        scale = self._scales.get(name, 1.0)
        if manager.scale(name) != scale:
            manager.set_scale(name, scale)
        marks = self._version(name), self._norms(name)
        self._records[name] = Resident(manager.configs[name], ready.structure, self._taken(name), *marks)

    def _taken(self, name: str) -> int:
        """Bytes an adapter takes on the model."""
        tensors: dict[int, Tensor] = {id(parameter): parameter for parameter in self._manager.parameters(name)}
        for named in self._manager.weights(name).copies.values():
            tensors.update((id(tensor), tensor) for tensor in named.values())
        return sum(tensor.nbytes for tensor in tensors.values())

    def drop(self, name: str, change: Transaction) -> None:
        """Takes an adapter off the model, if it is there."""
        change.keep(self._records)
        change.keep_attributes(self, "pinned", "_scales")
        if name in self.names:
            self._manager.remove(name)
            del self._records[name]
        self.pinned.discard(name)
        self._scales.pop(name, None)

    def _version(self, name: str) -> int:
        return sum(parameter._version for parameter in self._manager.parameters(name))

    def _norms(self, name: str) -> Tensor:
        """One entry a parameter, on the CPU."""
        norms = torch._foreach_norm([parameter.detach() for parameter in self._manager.parameters(name)])
        return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).nan_to_num().cpu()

    def _changed(self, name: str) -> bool:
        record = self._records[name]
        return self._version(name) != record.version or not torch.equal(self._norms(name), record.norms)
