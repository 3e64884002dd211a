"""Adapters that commands deleted or replaced, kept in host memory so that ``undo`` can bring them back."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbpeft.errors import BaseMismatchError

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.engine.changes.transaction import Transaction
    from nbpeft.engine.contract.adapter import AdapterConfig
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.engine.runtime.snapshots import AdapterSnapshot

MOST_KEPT = 10
"""Adapters that are kept for each model."""
MOST_BYTES = 2 * 2**30
"""Bytes that they may take together for each model; the last one is kept whatever it takes."""


@dataclass(frozen=True)
class PastAdapter:
    """An adapter that is gone or was replaced.

    Attributes:
        kept: the adapter as it was.
        did: what happened to it, e.g. ``deleted``.
        successor: config of what took its place, by which that is known again; None where nothing did.
        requested: what ``TrackedModel.requested`` had of it.
        combination: what ``TrackedModel.combinations`` had of it.
        in_place: whether its tensors were overwritten.
    """

    kept: AdapterSnapshot
    did: str
    successor: AdapterConfig | None
    requested: tuple[AdapterConfig, dict[str, Any]] | None
    combination: weakref.ref[Any] | None
    in_place: bool


@dataclass(frozen=True)
class PastModel:
    """What was trained and not saved on a model that is gone.

    Attributes:
        name: what it is called from now on, e.g. ``model (before)``.
        variable: that held it.
        adapters: as they were, in host memory.
        fingerprint: of its base model, as in the metadata of a file; empty where it is not known.
        runs: adapter -> the run on disk that has it, too.
        remembered: attribute of ``TrackedModel`` -> what it had of these adapters.
    """

    name: str
    variable: str
    adapters: tuple[AdapterSnapshot, ...]
    fingerprint: Mapping[str, str]
    runs: Mapping[str, str]
    remembered: Mapping[str, Mapping[str, Any]]

    @property
    def words(self) -> str:
        """``'sql' (in run sql-3), 'chat'``."""
        runs = {name: f" (in run {run})" for name, run in self.runs.items()}
        return ", ".join(f"{kept.name!r}{runs.get(kept.name, '')}" for kept in self.adapters)

    @property
    def byte_count(self) -> int:
        """Bytes in host memory."""
        return sum(kept.byte_count for kept in self.adapters)


class History:
    """The past adapters of each model, the last one last, which it takes along when it goes; and past models.

    Attributes:
        models: the past models, the last one last.
    """

    def __init__(self) -> None:
        self._past: weakref.WeakKeyDictionary[AdapterManager, tuple[PastAdapter, ...]] = weakref.WeakKeyDictionary()
        self.models: tuple[PastModel, ...] = ()

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the past models."""
        return tuple(model.name for model in self.models)

    def add_model(self, past: PastModel) -> tuple[PastModel, ...]:
        """Keeps what is left of one more model; returns those that are too much and forgotten."""
        kept, adapters, left = [past], MOST_KEPT - len(past.adapters), MOST_BYTES - past.byte_count
        for older in reversed(self.models):
            adapters, left = adapters - len(older.adapters), left - older.byte_count
            if left < 0 or adapters < 0:
                break
            kept.insert(0, older)
        dropped = self.models[: len(self.models) + 1 - len(kept)]
        self.models = tuple(kept)
        return dropped

    def model(self, name: str) -> PastModel | None:
        """The past model of that name."""
        return next((model for model in self.models if model.name == name), None)

    def drop_model(self, past: PastModel) -> None:
        """Forgets a past model."""
        self.models = tuple(model for model in self.models if model is not past)

    def of(self, manager: AdapterManager) -> tuple[PastAdapter, ...]:
        """What can be brought back to a model."""
        return self._past.get(manager, ())

    def add(self, manager: AdapterManager, past: PastAdapter, change: Transaction) -> None:
        """Keeps one more, and forgets the oldest where there are too many."""
        kept, left = [past], MOST_BYTES - past.kept.byte_count
        for older in reversed(self.of(manager)[1 - MOST_KEPT :]):
            left -= older.kept.byte_count
            if left < 0:
                break
            kept.insert(0, older)
        self._set(manager, tuple(kept), change)

    def drop_last(self, manager: AdapterManager, change: Transaction) -> None:
        """Forgets the last one."""
        self._set(manager, self.of(manager)[:-1], change)

    def take_back(self, manager: AdapterManager, past: tuple[PastAdapter, ...], change: Transaction) -> None:
        """Keeps what was kept at an earlier moment: what came since did not happen."""
        self._set(manager, past, change)

    def _set(self, manager: AdapterManager, past: tuple[PastAdapter, ...], change: Transaction) -> None:
        before = self.of(manager)
        change.on_undo(lambda: self._past.__setitem__(manager, before))
        self._past[manager] = past

    def forget_unloaded(self) -> None:
        """Lets go of what was kept of models whose adapters are unloaded."""
        for manager in [manager for manager in list(self._past) if not manager.alive]:
            self._past.pop(manager, None)

    def clear(self) -> None:
        """Forgets everything."""
        self._past.clear()
        self.models = ()


def base_difference(fingerprint: Mapping[str, str], base: nn.Module) -> str | None:
    """Why a model is not the base of adapters; None where it is, or where nothing says that it is not.

    Args:
        fingerprint: of the base of the adapters, as in the metadata of a file; empty where it is not known.
        base: the model. None of its adapters may be merged.
    """
    from nbpeft.checkpoint import compare

    if not fingerprint:
        return None
    try:
        return compare(fingerprint, base)
    except BaseMismatchError as error:
        return str(error)
