"""Which adapters of this process are identical to which folder: saved to it or loaded from it.

An adapter counts as unsaved again if another one overwrites its only copy.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbpeft.checkpoint.staging import Mark
from nbpeft.checkpoint.tensor_file import weights_mark
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.runtime.manager import AdapterManager


@dataclass(frozen=True)
class _Owner:
    """An adapter of a model. Both are referenced weakly, and renaming the adapter changes nothing.

    Attributes:
        manager: manager of the model.
        config: the adapter's config object.
        mark: identifies the version of the file.
    """

    manager: weakref.ref[AdapterManager]
    config: weakref.ref[AdapterConfig]
    mark: Mark | None

    @property
    def name(self) -> str | None:
        """Current name of the adapter; None if it is no longer on a model."""
        manager, config = self.manager(), self.config()
        if manager is None or config is None or not manager.alive:
            return None
        return next((name for name, present in manager.configs.items() if present is config), None)

    def is_adapter(self, manager: AdapterManager, name: str) -> bool:
        """Returns whether this is the adapter with a name."""
        return self.manager() is manager and self.config() is manager.configs[name]


_owners: dict[str, list[_Owner]] = {}
"""Folder -> the adapters that are identical to it: the one that was saved, and those that were loaded from it."""
_lock = threading.RLock()
"""Guards ``_owners`` and the managers' ``unsaved``, which have to agree in all threads."""


def note_place(manager: AdapterManager, name: str, folder: str | os.PathLike[str]) -> None:
    """Records that a folder has the current state of an adapter.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        folder: the folder.
    """
    with _lock:
        for place, owners in list(_owners.items()):
            _owners[place] = [owner for owner in owners if owner.name is not None]
            if not _owners[place]:
                del _owners[place]
        owners = _owners.setdefault(_key(folder), [])
        owners[:] = [owner for owner in owners if not owner.is_adapter(manager, name)]
        owners.append(_Owner(weakref.ref(manager), weakref.ref(manager.configs[name]), _mark(folder)))


def owner_of(manager: AdapterManager, name: str, folder: str | os.PathLike[str]) -> str | None:
    """Returns which adapter a folder has: the empty string for this one, the name of another, or None if unknown.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        folder: the folder.
    """
    with _lock:
        mark, names = _mark(folder), []
        for owner in _owners.get(_key(folder), ()):
            if owner.mark == mark and owner.name is not None:
                names.append("" if owner.is_adapter(manager, name) else owner.name)
        return None if not names else "" if "" in names else names[0]


def note_saved(manager: AdapterManager, places: Mapping[str, Path]) -> None:
    """Records that adapters were saved; adapters whose only copy was overwritten become unsaved.

    Args:
        manager: manager of the model.
        places: adapter name -> folder.
    """
    with _lock:
        lost = []
        for name, place in places.items():
            changed = name in manager.unsaved
            if changed:
                _forget(manager, name)  # other folders have its state before training
            owners = _owners.get(_key(place), [])
            if changed or not any(owner.is_adapter(manager, name) for owner in owners):
                lost += _owners.pop(_key(place), [])
        for name, place in places.items():
            note_place(manager, name, place)
        managers = [manager] if manager.unsaved & set(places) else []
        manager.unsaved -= set(places)
        managers += _mark_lost(lost)
    _tell(managers)


def note_written_over(folders: Iterable[str | os.PathLike[str]]) -> None:
    """Records that folders were overwritten by something else; adapters whose only copy this was become unsaved."""
    with _lock:
        changed = _mark_lost([owner for folder in folders for owner in _owners.pop(_key(folder), [])])
    _tell(changed)


def _mark_lost(owners: Iterable[_Owner]) -> list[AdapterManager]:
    """Marks adapters without another copy as unsaved, and returns the managers for which this is a change."""
    changed = []
    for owner in owners:
        manager, name = owner.manager(), owner.name
        if manager is not None and name is not None and name not in manager.unsaved and not _has_copy(owner):
            manager.unsaved.add(name)
            changed.append(manager)
    return changed


def _tell(managers: Iterable[AdapterManager]) -> None:
    """Notifies subscribers of the managers; without the lock, because they may wait for a thread that saves."""
    for manager in dict.fromkeys(managers):
        manager.changed()


def _forget(manager: AdapterManager, name: str) -> None:
    for owners in _owners.values():
        owners[:] = [owner for owner in owners if not owner.is_adapter(manager, name)]


def _has_copy(lost: _Owner) -> bool:
    """Returns whether another folder has the current state of an adapter."""
    return any(
        owner.manager() is lost.manager() and owner.config() is lost.config() and owner.mark == _mark(place)
        for place, owners in _owners.items()
        for owner in owners
    )


def _key(folder: str | os.PathLike[str]) -> str:
    return os.path.realpath(os.path.expanduser(os.fspath(folder)))


def _mark(folder: str | os.PathLike[str]) -> Mark | None:
    return weights_mark(_key(folder))
