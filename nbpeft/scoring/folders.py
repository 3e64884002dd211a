"""Adapters in folders: a few of them are on the model at a time, by way of an adapter pool."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from torch import nn

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import AdapterError
from nbpeft.model.swapping.pool import AdapterPool
from nbpeft.scoring.settings import Column

_AT_ONCE = 4
"""The greatest number of adapters of folders on the model."""
_NO_LIMIT = 1e9


def folder_columns(given: Any, taken: Collection[str]) -> tuple[Column, ...]:
    """The columns of adapters in folders.

    Args:
        given: name -> folder or hub id; or several folders, whose names are the parts in which their paths differ,
            with ``_saved`` if another column has that name.
        taken: the titles of other columns.

    Raises:
        AdapterError: it is neither, or a name is invalid or, in a mapping, taken.
    """
    if given is None:
        return ()
    if isinstance(given, str | os.PathLike):
        given = [given]
    if not isinstance(given, Mapping | list | tuple) or not all(isinstance(item, str | os.PathLike) for item in given):
        raise AdapterError(f"folders must be folders in a list, or name -> folder, not {given!r:.60}")
    named = dict(given) if isinstance(given, Mapping) else _named([os.fspath(item) for item in given], taken)
    for name, folder in named.items():
        check_name(name)
        if name in taken:
            raise AdapterError(f"{name!r} is the name of another column; choose another name", name=name)
        if not isinstance(folder, str | os.PathLike):
            raise AdapterError(f"folders: {name!r} needs a folder, not {folder!r:.60}", name=name)
    return tuple(Column(name, (name,), row=name, folder=os.fspath(folder)) for name, folder in named.items())


def _named(folders: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """Names for folders: ``sql-1`` and ``sql-2`` for ``runs/sql-1/adapter`` and ``runs/sql-2/adapter``.

    A name that another column has is followed by ``_saved``, as the folder may hold the same adapter.
    """
    folders = list(dict.fromkeys(folders))
    names = _parts_that_differ(folders)
    for place, name in enumerate(names):
        while names[place] in {*taken, *names[:place], *names[place + 1 :]} and name in taken:
            names[place] += "_saved"
    return dict(zip(names, folders, strict=True))


def _parts_that_differ(folders: Sequence[str]) -> list[str]:
    parts = [PurePath(folder).parts or (folder,) for folder in folders]
    if len(parts) == 1:
        return [parts[0][-1].replace(".", "_")]
    start = next((n for n, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), 0)
    ends = enumerate(zip(*(reversed(path) for path in parts), strict=False))
    end = next((n for n, same in ends if len(set(same)) > 1), 0)
    return ["-".join(path[start : len(path) - end] or path[-1:]).replace(".", "_") for path in parts]


def groups_of(columns: Sequence[Column]) -> list[list[int]]:
    """The columns that are computed together, by index: those of the model, then a few folders at a time."""
    there = [place for place, column in enumerate(columns) if not column.folder]
    folders = [place for place, column in enumerate(columns) if column.folder]
    groups = [folders[start : start + _AT_ONCE] for start in range(0, len(folders), _AT_ONCE)]
    return [there, *groups] if there else groups


@contextmanager
def loaded(model: nn.Module, columns: Sequence[Column]) -> Iterator[nn.Module]:
    """Context manager: has the adapters of folders on the model, and yields the model that serves them.

    Raises:
        AdapterError: the model has an adapter pool already.
        CheckpointError: an adapter cannot be loaded.
    """
    folders = {column.title: column.folder for column in columns if column.folder}
    if not folders:
        yield model
        return
    was_bare = manager_of(model) is None
    with DeferredInterrupts() as interrupts:
        pool = AdapterPool(model, _NO_LIMIT, host_limit_mb=0, adapters=folders)
        try:
            with interrupts.released():
                pool.load(list(folders))
                handle = pool.model
                handle.eval()
                yield handle
        finally:
            for name in folders:
                pool.unregister(name)
            pool.close()
            if was_bare:
                pool.manager.unload(merge=False)
