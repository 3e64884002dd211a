"""Blocks in which other adapters, or none, are active: each thread and asyncio task has its own."""

from __future__ import annotations

import warnings
from contextlib import ContextDecorator, ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.engine.changes.active_state import Scope
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.manager_protocol import Manager
from nbpeft.engine.runtime.merging import partly_merged
from nbpeft.errors import AdapterError, BusyError


class AdapterContext(ContextDecorator):
    """A block with its own active adapters; afterwards everything is as before.

    Blocks nest, and those of several threads or asyncio tasks may overlap. If adapters are merged, they are
    unmerged until the last block has ended; outside of blocks they stay active meanwhile.

    Args:
        manager: the model's manager.
        names: the active adapters; None for the base model alone.
        independent: the adapters are trained side by side and need not be compatible; the first is active unless a
            call names others.
    """

    _scope: Scope | None = None  # on the class: an interruption can come before __init__

    def __init__(self, manager: Manager, names: tuple[str, ...] | None, *, independent: bool = False) -> None:
        self._manager = manager
        self._names = names
        self._independent = independent
        self._again: tuple[str, ...] = ()
        self._woken: dict[str, list[tuple[Tensor, bool]]] = {}
        self._provided = ExitStack()

    @property
    def _aim(self) -> str:
        return "they are disabled" if self._names is None else "another is activated"

    def _recreate_cm(self) -> AdapterContext:
        return AdapterContext(self._manager, self._names, independent=self._independent)

    def __enter__(self) -> None:
        manager = self._manager
        manager.check_alive()
        if self._scope is not None:
            raise AdapterError("this block is open already: call use() or disable_adapter() again for another")
        try:
            if self._names is not None:
                self._bring(self._names)
            with manager.transaction(during_calls=not manager.merged, quiet=True) as change:
                if self._names is not None:
                    for chosen in [(name,) for name in self._names] if self._independent else [self._names]:
                        manager.check_choice(chosen)
                if manager.merged:
                    warnings.warn(f"adapters are merged: unmerging before {self._aim}", stacklevel=3)
                    _park(manager)
                self._open(change)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def _bring(self, names: tuple[str, ...]) -> None:
        """Loads adapters that come from a provider; the selected ones may be unloaded to make room meanwhile."""
        before = self._manager.selected
        with self._manager.ensure_loaded(names, switching=True):
            self._provided.enter_context(self._manager.ensure_loaded(names))
        now = self._manager.selected
        if now != before:
            self._again = before  # reselected once the loaded adapters are released and can make room

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
        # Adapters that are active in another scope, or outside of all scopes, have their gradients on already.
        woken = self._manager.idle(names) if self._names is not None else set()
        self._woken = {
            name: [(parameter, parameter.requires_grad) for parameter in self._manager.parameters(name)]
            for name in woken
        }
        active_state.enter(scope)
        self._manager.refresh(woken, change)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with HeldInterrupts(to_the_end=True):
            scope, self._scope = self._scope, None
            try:
                if scope is not None:
                    self._close(scope)
            finally:
                self._provided.__exit__(kind, error, trace)
            again, self._again = self._again, ()
            if again and self._manager.alive:
                self._manager.select_again(again)

    def _close(self, scope: Scope) -> None:
        manager = self._manager
        manager.active_state.leave(scope)
        if manager.alive:
            if self._woken or manager.idle(scope.names):  # else no adapter stops being trained here
                with manager.transaction(during_calls=True, quiet=True) as change:
                    manager.refresh(manager.idle(scope.names) - self._woken.keys(), change)
                    flags = [flag for name in manager.idle(tuple(self._woken)) for flag in self._woken[name]]
                    for value in (True, False):
                        change.set_requires_grad((parameter for parameter, trained in flags if trained is value), value)
            self._merge_again()

    def _merge_again(self) -> None:
        for last in (False, True):
            try:
                _merge_parked(self._manager)
            except BusyError:  # inside a call: they are active all the same, and are merged after the next block
                return
            except Exception as error:
                if last:
                    reason = f"{type(error).__name__}: {error}"
                    warnings.warn(
                        f"what was merged could not be merged again and acts unmerged: {reason}", stacklevel=5
                    )
            else:
                return

    def __del__(self) -> None:
        # An interruption between two instructions can prevent a block from ending: then it ends with its last
        # reference.
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
    """Merges again what ``_park`` unmerged, as far as it still exists and the selection has not changed."""
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
