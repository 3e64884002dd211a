"""Stop, Pause and Save for a running training, requested from any thread, carried out between steps."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbpeft._util.subscribers import Subscribers


@dataclass(frozen=True)
class CloneRequest:
    """A request to clone an adapter of a sweep.

    Attributes:
        source: the adapter, which continues unchanged.
        name: name of the clone; None to make one from its own settings.
        fields: settings in which the clone differs, e.g. ``learning_rate``.
        rate_factor: factor on the learning rate that the clone would have otherwise.
    """

    source: str
    name: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    rate_factor: float = 1.0


class RunControl:
    """The requests of a front end to a run.

    Requests may come from any thread. The training loop carries them out in :meth:`wait_or_stop`, so
    that no step is interrupted in the middle. A request sets a desired state and does not toggle it, so that repeating
    it changes nothing: it may be carried out long after it was made.

    Attributes:
        deliver_clicks: Called between steps and, while paused, every ``poll_interval`` seconds. A
            front end whose clicks do not arrive while a cell runs delivers them here. A
            function that raises is dropped with a warning, and training continues.
        reason: Why a stop was requested, in one line.
    """

    poll_interval = 0.05
    reaches_all = False
    """Whether all processes of a training carry out each request, at the same step."""
    writes = True
    """Whether this process writes the saved files."""

    def __init__(self) -> None:
        self.deliver_clicks: Callable[[], None] | None = None
        self.reason = ""
        self._changed = threading.Condition()
        self._subscribers = Subscribers()
        self._stop = False
        self._paused = False
        self._waiting = False
        self._save = False
        self._members: set[str] = set()
        self._clones: list[CloneRequest] = []

    @property
    def stop_requested(self) -> bool:
        """Whether the run should end after the current step."""
        return self._stop

    @property
    def paused(self) -> bool:
        """Whether the run should wait before its next step."""
        return self._paused and not self._stop

    @property
    def waiting(self) -> bool:
        """Whether the run is waiting now: a requested pause begins when the current step has ended."""
        return self._waiting

    @property
    def save_requested(self) -> bool:
        """Whether the adapter should be saved after the current step."""
        return self._save

    @property
    def members_to_stop(self) -> frozenset[str]:
        """The adapters of a sweep whose training should end after the current step."""
        return frozenset(self._members)

    @property
    def members_to_clone(self) -> frozenset[str]:
        """The adapters of a sweep that should be cloned after the current step."""
        return frozenset(request.source for request in list(self._clones))

    def on_request(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Registers a callback for each request; it runs in the thread that made the request.

        Args:
            callback: must return at once, and may be called in the thread that receives the kernel's messages. A bound
                method is held weakly.
        """
        return self._subscribers.add(callback)

    def request_stop(self, reason: str = "") -> None:
        """Asks the run to end after the current step; ends a pause too.

        Args:
            reason: why, in one line, for the run's message.
        """
        with self._changed:
            if not self._stop:
                self._stop, self.reason = True, reason
            self._changed.notify_all()
        self._report()

    def request_save(self) -> None:
        """Asks the run to save the adapter after the current step."""
        with self._changed:
            self._save = True
            self._changed.notify_all()
        self._report()

    def request_stop_of(self, member: str) -> None:
        """Asks the run to end the training of one adapter of a sweep after the current step; the others continue."""
        with self._changed:
            self._members.add(member)
            self._changed.notify_all()
        self._report()

    def request_clone_of(self, member: str, name: str | None = None, **fields: Any) -> None:
        """Asks the run to clone an adapter of a sweep after the current step, and train the clone with other settings.

        Args:
            member: the adapter, which continues unchanged.
            name: name of the clone; None to make one from its own settings.
            **fields: settings in which the clone differs, e.g. ``learning_rate``; half the learning rate by default.
        """
        with self._changed:
            self._clones.append(CloneRequest(member, name, fields, 1.0 if fields else 0.5))
            self._changed.notify_all()
        self._report()

    def take_clones(self) -> list[CloneRequest]:
        """Returns the pending clone requests and clears them; called by the training loop between steps."""
        requests, self._clones = self._clones, []
        return requests

    def pause(self) -> None:
        """Asks the run to wait before its next step."""
        self._set_paused(True)

    def resume(self) -> None:
        """Ends a pause."""
        self._set_paused(False)

    def wait_or_stop(
        self, on_wait: Callable[[], None] | None = None, on_save: Callable[[], None] | None = None
    ) -> bool:
        """Called by the training loop between steps; blocks while paused.

        Args:
            on_wait: Called once, before the first wait of this call.
            on_save: Called if saving was requested, also during a pause.

        Returns:
            Whether the loop should end.
        """
        self._deliver()
        self._save_if_requested(on_save)
        if self.paused:
            self._wait(on_wait, on_save)
        return self._stop

    def relay(self, on_save: Callable[[], None], *, waiting: bool) -> None:
        """Called by the parent process instead of ``wait_or_stop``, if the run takes place in other processes.

        Args:
            on_save: called if saving was requested.
            waiting: whether the run is waiting now.
        """
        self._deliver()
        self._save_if_requested(on_save)
        self._waiting = waiting

    def _wait(self, on_wait: Callable[[], None] | None, on_save: Callable[[], None] | None) -> None:
        self._waiting = True
        try:
            if on_wait is not None:
                on_wait()
            while self.paused:
                with self._changed:
                    if self.paused and not self._save:
                        self._changed.wait(self.poll_interval)
                self._deliver()
                self._save_if_requested(on_save)
        finally:
            self._waiting = False

    def _set_paused(self, paused: bool) -> None:
        with self._changed:
            self._paused = paused
            self._changed.notify_all()
        self._report()

    def _report(self) -> None:
        for failure in self._subscribers.notify():
            warnings.warn(failure, stacklevel=3)

    def _save_if_requested(self, save: Callable[[], None] | None) -> None:
        if self._save:
            self._save = False
            if save is not None:
                save()

    def _deliver(self) -> None:
        if self.deliver_clicks is None:
            return
        try:
            self.deliver_clicks()
        except Exception as error:
            self.deliver_clicks = None
            warnings.warn(
                f"The buttons of this run no longer work ({type(error).__name__}: {error}); "
                "interrupting the kernel still stops it.",
                stacklevel=2,
            )
