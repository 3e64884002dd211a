"""Recording an adapter before a command deletes or replaces it, so that ``undo`` can restore it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nbpeft.errors import BusyError
from nbpeft.session.history import PastAdapter

if TYPE_CHECKING:
    from nbpeft.engine.changes.transaction import Transaction
    from nbpeft.engine.runtime.manager import AdapterManager
    from nbpeft.session.context import SessionContext
    from nbpeft.session.registry import TrackedModel


class Undoable:
    """An adapter that a command is about to delete or replace.

    Args:
        ctx: context of the session.
        tracked: its model.
        name: name of the adapter.
        did: what happens to it, e.g. ``deleted``.
        in_place: whether its tensors are overwritten.
    """

    def __init__(
        self, ctx: SessionContext, tracked: TrackedModel, name: str, did: str, *, in_place: bool = False
    ) -> None:
        from nbpeft.engine.runtime.snapshots import snapshot

        self._ctx, self._tracked, self._did, self._in_place = ctx, tracked, did, in_place
        self.kept = snapshot(tracked.manager, name)

    @contextmanager
    def change(self) -> Iterator[None]:
        """A transaction in which the adapter is deleted or replaced, together with the session's entries for it.

        Raises:
            UnknownAdapterError: another thread has deleted it since the snapshot.
            BusyError: another thread has replaced it since the snapshot.
        """
        manager = self._tracked.manager
        with manager.transaction() as change:
            if manager.configs[self.kept.name] is not self.kept.config:
                raise BusyError(f"another thread changed {self.kept.name!r} meanwhile: try again")
            yield
            self.on_removed(change)

    def on_removed(self, change: Transaction) -> None:
        """Records the adapter in the history, inside the transaction that deletes or replaces it."""
        ctx, tracked, name = self._ctx, self._tracked, self.kept.name
        change.keep_attributes(tracked, "requested")
        change.keep(tracked.combinations)
        requested = tracked.requested.pop(name, None)
        combination = tracked.combinations.pop(name, None)
        successor = tracked.manager.configs.get(name)
        trained = tracked.trained_steps.get(name)
        past = PastAdapter(self.kept, self._did, successor, requested, combination, trained, self._in_place)
        ctx.history.add(tracked.manager, past, change)


def unsaved_words(manager: AdapterManager, name: str) -> str:
    """Returns ``, which was trained and is not saved``, or the empty string for a saved adapter."""
    return ", which was trained and is not saved" if name in manager.unsaved else ""
