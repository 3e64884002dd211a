"""One command at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nbpeft._util.interrupts import HeldInterrupts, RunningBlock
from nbpeft.errors import BusyError

_LOOKING = 1.0
"""Seconds that building a state takes at most."""


@dataclass(frozen=True, eq=False)
class RunningCommand:
    """A command that holds the lock.

    Attributes:
        description: what it does; empty where a thread only looks.
        block: that it runs in. An interruption can keep it from being left, and then it holds nothing.
    """

    description: str
    block: RunningBlock


class CommandLock:
    """A lock that its thread may take again, and that other threads never wait for."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._holding: list[RunningCommand] = []
        self._reservations: dict[str, tuple[int, str, weakref.ref[object]]] = {}

    @property
    def busy(self) -> str:
        """A description of what is running, or the empty string."""
        running = self._descriptions() or [
            description for _, description, owner in list(self._reservations.values()) if owner() is not None
        ]
        return running[0] if running else ""

    @property
    def depth(self) -> int:
        """How many commands are nested at the moment."""
        return len(self._descriptions())

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

    def take(self, description: str, block: RunningBlock) -> RunningCommand:
        """Hold the lock until ``give_back``; what another thread only looks at is waited for, as it takes no time.

        Args:
            description: what the command does, e.g. ``merging 'sql'``; other threads see it.
            block: that the command runs in.

        Raises:
            BusyError: another thread runs a command.
        """
        command = RunningCommand(description, block)
        with HeldInterrupts(), self._condition:
            self._condition.wait_for(lambda: self._is_free() or bool(self._descriptions()), timeout=_LOOKING)
            if not self._is_free():
                raise _busy(self.busy or "another command")
            self._check_reservations()
            self._holding = [earlier for earlier in self._holding if not earlier.block.ended_before(block)] + [command]
        return command

    def give_back(self, command: RunningCommand) -> None:
        """End the hold that ``take`` has returned; one that has ended already is left alone."""
        with HeldInterrupts(), self._condition:
            self._holding = [other for other in self._holding if other is not command]
            self._condition.notify_all()

    @contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Take the lock if it is free for this thread; yields whether it was."""
        look = RunningCommand("", RunningBlock(__name__))
        with HeldInterrupts(), self._condition:
            free = self._is_free()
            if free:
                self._holding = [*self._holding, look]
        try:
            yield free
        finally:
            self.give_back(look)

    def _is_free(self) -> bool:
        """Whether this thread may take it; forgets commands that have ended without giving it back."""
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
