"""Stop, Pause and Save in several processes: rank 0 receives the requests, and all processes act at the same step."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from nbpeft.training.disk.agreement import broadcast_from_rank0, is_main_process
from nbpeft.training.monitor.control import RunControl

_STOP, _PAUSE, _SAVE = range(3)


class SharedControl(RunControl):
    """A ``RunControl`` whose requests are carried out by all processes after the same step.

    If one process paused alone, the others would block in a collective operation until it times out. So rank 0
    stores the requests, and broadcasts them at each check of the run, which all processes make at the same steps.
    """

    reaches_all = True

    def __init__(self) -> None:
        super().__init__()
        self._wanted = [False, False, False]
        self._reason = ""
        # Requests arrive in another thread than the one that trains.
        self._guard = threading.Lock()

    def take(self, request: Mapping[str, Any]) -> None:
        """Stores a request in rank 0; may be called in any thread.

        Args:
            request: any of ``stop``, ``reason``, ``pause`` and ``save``; those left out do not change.
        """
        with self._guard:
            for place, name in ((_STOP, "stop"), (_PAUSE, "pause"), (_SAVE, "save")):
                self._wanted[place] = bool(request.get(name, self._wanted[place]))
            self._reason = str(request.get("reason", self._reason))

    @property
    def writes(self) -> bool:  # type: ignore[override]  # a constant in RunControl, for a single process
        """Whether this process writes the saved files."""
        return is_main_process()

    def wait_for_stop(self, timeout: float) -> bool:
        """Waits at most ``timeout`` seconds until a stop has been delivered to the run.

        Returns:
            Whether it has: a run whose step does not end receives no requests.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._stop, timeout)

    def _deliver(self) -> None:
        with self._guard:
            wanted, self._wanted[_SAVE] = list(self._wanted), False
        stop, pause, save = broadcast_from_rank0(wanted)
        if stop:
            self.request_stop(self._reason)
        if pause != self._paused:
            self._set_paused(pause)
        if save:  # in every process: each has a shard of the model, and rank 0 writes
            self.request_save()
