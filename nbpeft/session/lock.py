"""The lock that allows one command at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nbpeft._util.interrupts import DeferredInterrupts, RunningBlock
from nbpeft.errors import BusyError

_LOOKING = 1.0
"""Maximal time in seconds to wait for another thread that builds a state."""


@dataclass(frozen=True, eq=False)
class RunningCommand:
    """A command that has acquired the lock.

    Attributes:
        description: what it does; empty for a thread that only reads the state.
        block: the block in which it runs. If an interruption prevented its ``__exit__``, the lock is free anyway.
    """

    description: str
    block: RunningBlock


class CommandLock:
    """A reentrant lock for which other threads do not wait."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        # Replaced and never changed in place, because ``busy`` reads it without the condition.
        self._holding: list[RunningCommand] = []
        self._reservations: dict[str, tuple[int, str, weakref.ref[object]]] = {}

    @property
    def busy(self) -> str:
        """Description of the running command, or the empty string."""
        running = self._descriptions() or [
            description for _, description, owner in list(self._reservations.values()) if owner() is not None
        ]
        return running[0] if running else ""

    @property
    def depth(self) -> int:
        """Number of nested commands at the moment."""
        return len(self._descriptions())

    def reserve(self, key: str, description: str, owner: object) -> None:
        """Block commands of other threads while a user's training loop runs.

        Args:
            key: key for ``release``.
            description: description of what is running.
            owner: referenced weakly; the reservation ends at the latest when it is deleted.
        """
        self._reservations[key] = (threading.get_ident(), description, weakref.ref(owner))

    def release(self, key: str) -> None:
        """End a reservation."""
        self._reservations.pop(key, None)

    def take(self, description: str, block: RunningBlock) -> RunningCommand:
        """Acquire the lock until ``give_back``; waits only for threads that read the state, which is fast.

        Args:
            description: description of the command for other threads, e.g. ``merging 'sql'``.
            block: the block in which the command runs.

        Raises:
            BusyError: another thread runs a command.
        """
        command = RunningCommand(description, block)
        # An interrupt waits, so that it cannot leave the lock taken by a command that never began.
        with DeferredInterrupts(), self._condition:
            self._condition.wait_for(lambda: self._is_free() or bool(self._descriptions()), timeout=_LOOKING)
            if not self._is_free():
                raise _busy(self.busy or "another command")
            self._check_reservations()
            self._holding = [earlier for earlier in self._holding if not earlier.block.ended_before(block)] + [command]
        return command

    def give_back(self, command: RunningCommand) -> None:
        """Release the lock for a command; does nothing if it was already released."""
        with DeferredInterrupts(), self._condition:
            self._holding = [other for other in self._holding if other is not command]
            self._condition.notify_all()

    @contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Acquire the lock if it is free for this thread; yields whether it was."""
        look = RunningCommand("", RunningBlock(__name__))
        with DeferredInterrupts(), self._condition:
            free = self._is_free()
            if free:
                self._holding = [*self._holding, look]
        try:
            yield free
        finally:
            self.give_back(look)

    def _is_free(self) -> bool:
        """Returns whether this thread can acquire the lock; removes commands that ended without releasing it."""
        self._holding = [command for command in self._holding if command.block.runs()]
        return all(command.block.thread == threading.get_ident() for command in self._holding)

    def _descriptions(self) -> list[str]:
        return [command.description for command in self._holding if command.description and command.block.runs()]

    def _check_reservations(self) -> None:
        me = threading.get_ident()
        for key, (thread, description, owner) in list(self._reservations.items()):
            if owner() is None:
                self._reservations.pop(key, None)
            elif thread != me:
                raise _busy(description)


def _busy(running: str) -> BusyError:
    return BusyError(f"busy: {running}; try again when it has finished", running=running)
