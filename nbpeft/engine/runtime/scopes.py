"""Blocks in which a thread or asyncio task uses other adapters, or none."""

from __future__ import annotations

import warnings
from contextlib import ContextDecorator, ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.engine.changes.active_state import Scope
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.manager_protocol import Manager
from nbpeft.engine.runtime.merging import partly_merged
from nbpeft.errors import AdapterError, BusyError


class AdapterContext(ContextDecorator):
    """A block with other active adapters; the previous ones are restored at its end.

    Blocks can be nested, and those of several threads or asyncio tasks can overlap. Merged adapters are unmerged until
    the last block has ended; during that time they stay active outside of blocks.

    Args:
        manager: the model's manager.
        names: the active adapters; None for the base model without adapters.
        independent: the adapters are trained independently and need not be compatible; the first is active unless a
            call names others.
    """

    _scope: Scope | None = None  # on the class: an interruption can come before __init__

    def __init__(self, manager: Manager, names: tuple[str, ...] | None, *, independent: bool = False) -> None:
        self._manager = manager
        self._names = names
        self._independent = independent
        self._to_reselect: tuple[str, ...] = ()
        self._flags: dict[str, list[tuple[Tensor, bool]]] = {}
        """Name of each adapter that was idle before the block -> its parameters and their ``requires_grad``."""
        self._provided = ExitStack()

    def _recreate_cm(self) -> AdapterContext:
        return AdapterContext(self._manager, self._names, independent=self._independent)

    def __enter__(self) -> None:
        manager = self._manager
        manager.check_alive()
        if self._scope is not None:
            raise AdapterError("this block is open already: call use() or disable_adapter() again for another")
        try:
            if self._names is not None:
                self._load(self._names)
            with manager.transaction(during_calls=not manager.merged, quiet=True) as change:
                if self._names is not None:
                    for chosen in [(name,) for name in self._names] if self._independent else [self._names]:
                        manager.check_choice(chosen)
                if manager.merged:
                    reason = "they are disabled" if self._names is None else "another is activated"
                    warnings.warn(f"adapters are merged: unmerging before {reason}", stacklevel=3)
                    _park(manager)
                self._open(change)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def _load(self, names: tuple[str, ...]) -> None:
        """Loads adapters from the provider, which may unload the selected ones to make room."""
        before = self._manager.selected
        with self._manager.ensure_loaded(names, switching=True):
            self._provided.enter_context(self._manager.ensure_loaded(names))
        now = self._manager.selected
        if now != before:
            self._to_reselect = before  # only at the end of the block, when there is room for them again

    def _open(self, change: Transaction) -> None:
        active_state = self._manager.active_state
        names = self._manager.active if self._names is None else self._names
        chooses = self._names is not None
        scope = Scope(names, chooses, chooses, self._independent, active_state.scope)

        def undo() -> None:
            self._scope = None
            active_state.leave(scope)

        change.on_undo(undo)
        self._scope = scope
        # Adapters that are active in another block, or outside of blocks, already have the right requires_grad.
        idle = self._manager.idle(names) if self._names is not None else set()
        self._flags = {
            name: [(parameter, parameter.requires_grad) for parameter in self._manager.parameters(name)]
            for name in idle
        }
        active_state.enter(scope)
        self._manager.refresh(idle, change)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An interrupt in between would leave other adapters active after the block.
        with DeferredInterrupts(to_the_end=True):
            scope, self._scope = self._scope, None
            try:
                if scope is not None:
                    self._close(scope)
            finally:
                self._provided.__exit__(kind, error, trace)
            names, self._to_reselect = self._to_reselect, ()
            if names and self._manager.alive:
                self._manager.select_again(names)

    def _close(self, scope: Scope) -> None:
        manager = self._manager
        manager.active_state.leave(scope)
        if manager.alive:
            if self._flags or manager.idle(scope.names):  # otherwise no requires_grad changes
                with manager.transaction(during_calls=True, quiet=True) as change:
                    manager.refresh(manager.idle(scope.names) - self._flags.keys(), change)
                    flags = [flag for name in manager.idle(tuple(self._flags)) for flag in self._flags[name]]
                    for value in (True, False):
                        change.set_requires_grad((parameter for parameter, trained in flags if trained is value), value)
            self._merge_again()

    def _merge_again(self) -> None:
        for last in (False, True):
            try:
                _merge_parked(self._manager)
            except BusyError:  # inside a call: they stay active unmerged, and are merged after the next block
                return
            except Exception as error:
                if last:
                    reason = f"{type(error).__name__}: {error}"
                    warnings.warn(
                        f"the merged adapters could not be merged again and are active unmerged: {reason}", stacklevel=5
                    )
            else:
                return

    def __del__(self) -> None:
        # An interrupt between two instructions can skip __exit__; then the block ends with its last reference.
        if self._scope is not None:
            self.__exit__(None, None, None)


def _park(manager: Any) -> None:
    """Unmerges adapters for a block that needs the frozen weights; outside of the block they stay active."""
    with manager.transaction() as change:
        manager._keep_choice(change)
        names, partly = manager.merged, partly_merged(manager.layers, manager.merged)
        manager.unmerge()
        manager._parked, manager._parked_layers = names, partly
        manager._publish_active()


def _merge_parked(manager: Any) -> None:
    """Merges again what ``_park`` unmerged, unless the selection has changed or the adapters were deleted."""
    if not manager._parked:
        return
    with manager.transaction() as change:
        if not manager._parked or manager.active_state.scopes:
            return
        manager._keep_choice(change)
        names, partly = manager._parked, manager._parked_layers
        manager._parked, manager._parked_layers = (), {}
        manager._merge(names, change, but=partly)
        for path in partly.keys() & manager.layers.keys():
            layer = manager.layers[path]
            there = [name for name in partly[path] if name in names and name in layer.adapters]
            manager.layer_commands.merge(layer, there, safe=False)
