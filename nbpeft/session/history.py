"""Adapters that commands deleted or replaced, stored in host memory so that ``undo`` can restore them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbpeft.errors import BaseMismatchError
from nbpeft.sweeps import MOST

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.engine.changes.transaction import Transaction
    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.engine.runtime.snapshots import AdapterSnapshot

MOST_KEPT = MOST
"""Maximal number of stored adapters per model: those of the largest sweep."""
MOST_BYTES = 2 * 2**30
"""Maximal size of the stored adapters per model in bytes; the last one is stored whatever its size."""


@dataclass(frozen=True)
class PastAdapter:
    """An adapter that was deleted or replaced.

    Attributes:
        kept: snapshot of the adapter.
        did: what happened to it, e.g. ``deleted``.
        successor: config of the adapter that replaced it, for recognizing that; None if it was deleted.
        requested: its entry in ``TrackedModel.requested``.
        combination: its entry in ``TrackedModel.combinations``.
        trained: its entry in ``TrackedModel.trained_steps``.
        in_place: whether its tensors were overwritten.
    """

    kept: AdapterSnapshot
    did: str
    successor: AdapterConfig | None
    requested: tuple[AdapterConfig, dict[str, Any]] | None
    combination: weakref.ref[Any] | None
    trained: tuple[AdapterConfig, int, str] | None
    in_place: bool


@dataclass(frozen=True)
class PastModel:
    """The trained and unsaved adapters of a model that no longer exists, or whose adapters were unloaded.

    Attributes:
        name: the model's name from now on, e.g. ``model (before)``.
        variable: name of its former variable.
        adapters: snapshots of the adapters, in host memory.
        fingerprint: fingerprint of its base model, as in the metadata of a file; empty if unknown.
        runs: adapter -> the run on disk that also has it.
        remembered: attribute of ``TrackedModel`` -> the entries of these adapters.
    """

    name: str
    variable: str
    adapters: tuple[AdapterSnapshot, ...]
    fingerprint: Mapping[str, str]
    runs: Mapping[str, str]
    remembered: Mapping[str, Mapping[str, Any]]

    @property
    def words(self) -> str:
        """The adapters as text: ``'sql' (in run sql-3), 'chat'``."""
        runs = {name: f" (in run {run})" for name, run in self.runs.items()}
        return ", ".join(f"{kept.name!r}{runs.get(kept.name, '')}" for kept in self.adapters)

    @property
    def dropped_words(self) -> str:
        """The message once they were dropped."""
        return f"{self.words} of {self.name!r} can no longer be restored: the limit of memory is reached"

    @property
    def byte_count(self) -> int:
        """Size in host memory in bytes."""
        return sum(kept.byte_count for kept in self.adapters)


class History:
    """The past adapters of each model, most recent last, stored as long as the model exists; and past models.

    Attributes:
        models: the past models, most recent last.
    """

    def __init__(self) -> None:
        self._past: weakref.WeakKeyDictionary[AdapterManager, tuple[PastAdapter, ...]] = weakref.WeakKeyDictionary()
        self.models: tuple[PastModel, ...] = ()

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the past models."""
        return tuple(model.name for model in self.models)

    def add_model(self, past: PastModel) -> tuple[PastModel, ...]:
        """Adds a past model; returns the older ones that were dropped because of the limits."""
        remaining, adapters, bytes_left = [past], MOST_KEPT - len(past.adapters), MOST_BYTES - past.byte_count
        for older in reversed(self.models):
            adapters, bytes_left = adapters - len(older.adapters), bytes_left - older.byte_count
            if bytes_left < 0 or adapters < 0:
                break
            remaining.insert(0, older)
        dropped = self.models[: len(self.models) + 1 - len(remaining)]
        self.models = tuple(remaining)
        return dropped

    def model(self, name: str) -> PastModel | None:
        """Returns the past model with this name, or None."""
        return next((model for model in self.models if model.name == name), None)

    def drop_model(self, past: PastModel) -> None:
        """Drops a past model."""
        self.models = tuple(model for model in self.models if model is not past)

    def of(self, manager: AdapterManager) -> tuple[PastAdapter, ...]:
        """Returns the adapters that can be restored on a model, most recent last."""
        return self._past.get(manager, ())

    def add(self, manager: AdapterManager, past: PastAdapter, change: Transaction) -> None:
        """Adds a past adapter, and drops the oldest ones beyond the limits."""
        kept, left = [past], MOST_BYTES - past.kept.byte_count
        for older in reversed(self.of(manager)[1 - MOST_KEPT :]):
            left -= older.kept.byte_count
            if left < 0:
                break
            kept.insert(0, older)
        self.take_back(manager, tuple(kept), change)

    def drop_last(self, manager: AdapterManager, change: Transaction) -> None:
        """Drops the most recent past adapter of a model."""
        self.take_back(manager, self.of(manager)[:-1], change)

    def take_back(self, manager: AdapterManager, past: tuple[PastAdapter, ...], change: Transaction) -> None:
        """Resets the past adapters of a model to those of an earlier moment."""
        before = self.of(manager)
        change.on_undo(lambda: self._past.__setitem__(manager, before))
        self._past[manager] = past

    def forget_unloaded(self) -> None:
        """Drops the past adapters of models whose adapters were unloaded."""
        for manager in [manager for manager in list(self._past) if not manager.alive]:
            self._past.pop(manager, None)

    def clear(self) -> None:
        """Drops everything."""
        self._past.clear()
        self.models = ()


def base_difference(fingerprint: Mapping[str, str], base: nn.Module) -> str | None:
    """Returns why a model is not the base of adapters; None if it is, or if the base is unknown.

    Args:
        fingerprint: fingerprint of the adapters' base, as in the metadata of a file; empty if unknown.
        base: the model, whose adapters must not be merged.
    """
    from nbpeft.checkpoint import compare

    if not fingerprint:
        return None
    try:
        return compare(fingerprint, base)
    except BaseMismatchError as error:
        return str(error)
