"""One command at a time, and subscribers that cannot break a command."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbpeft.errors import BusyError

Callback = Callable[..., object]


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
        if not self._lock.acquire(blocking=False):
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


class Subscribers:
    """Callbacks for events; bound methods are held weakly."""

    def __init__(self) -> None:
        self._references: list[Callable[[], Callback | None]] = []

    def add(self, callback: Callback) -> Callable[[], None]:
        """Add a callback; returns the function that removes it again."""
        reference: Callable[[], Callback | None]
        reference = weakref.WeakMethod(callback) if inspect.ismethod(callback) else (lambda: callback)
        self._references.append(reference)

        def remove() -> None:
            if reference in self._references:
                self._references.remove(reference)

        return remove

    def notify(self, *event: object) -> list[str]:
        """Call every callback; returns one line for each that failed."""
        failures = []
        for reference in list(self._references):
            callback = reference()
            if callback is None:
                if reference in self._references:
                    self._references.remove(reference)
                continue
            try:
                callback(*event)
            except Exception as error:
                name = getattr(callback, "__qualname__", repr(callback))
                failures.append(f"a subscriber failed: {name}: {type(error).__name__}: {error}")
        return failures

    def clear(self) -> None:
        """Forget all callbacks."""
        self._references.clear()
