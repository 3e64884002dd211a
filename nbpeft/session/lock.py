"""One command at a time, and subscribers that cannot break a command."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from nbpeft.errors import BusyError

_LOOKING = 1.0
"""Seconds that building a state takes at most."""


class CommandLock:
    """A lock that its thread may take again, and that other threads never wait for."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._running: list[str] = []
        self._reservations: dict[str, tuple[int, str, weakref.ref[object]]] = {}

    @property
    def busy(self) -> str:
        """A description of what is running, or the empty string."""
        running = list(self._running) or [
            description for _, description, owner in self._reservations.values() if owner() is not None
        ]
        return running[0] if running else ""

    def reserve(self, key: str, description: str, owner: object) -> None:
        """Keep commands of other threads out while a loop of the user's runs.

        Args:
            key: what ``release`` is called with.
            description: what runs.
            owner: held weakly; the reservation ends with it at the latest.
        """
        self._reservations[key] = (threading.get_ident(), description, weakref.ref(owner))

    def release(self, key: str) -> None:
        """End a reservation."""
        self._reservations.pop(key, None)

    @property
    def depth(self) -> int:
        """How many commands are nested at the moment."""
        return len(self._running)

    @contextmanager
    def command(self, description: str) -> Iterator[None]:
        """Hold the lock.

        Args:
            description: what the command does, e.g. ``merging 'sql'``; other threads see it.

        Raises:
            BusyError: another thread runs a command.
        """
        if not self._acquire():
            running = self.busy or "another command"
            raise _busy(running)
        try:
            self._check_reservations()
        except BusyError:
            self._lock.release()
            raise
        self._running.append(description)
        try:
            yield
        finally:
            self._running.pop()
            self._lock.release()

    def _acquire(self) -> bool:
        """Take the lock; what another thread only looks at is waited for, because that takes no time."""
        return self._lock.acquire(blocking=False) or (not self._running and self._lock.acquire(timeout=_LOOKING))

    def _check_reservations(self) -> None:
        me = threading.get_ident()
        for key, (thread, description, owner) in list(self._reservations.items()):
            if owner() is None:
                self._reservations.pop(key, None)
            elif thread != me:
                raise _busy(description)

    @contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Take the lock if it is free for this thread; yields whether it was."""
        free = self._lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._lock.release()


def _busy(running: str) -> BusyError:
    return BusyError(f"busy: {running}; try again when it has finished", running=running)
