"""Stop, Pause and Save in several processes at once: the first one is asked, and all of them hear of it at one step."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from nbpeft.training.disk.agreement import broadcast_from_rank0, is_main_process
from nbpeft.training.monitor.control import RunControl

_STOP, _PAUSE, _SAVE = range(3)


class SharedControl(RunControl):
    """A ``RunControl`` whose requests are carried out by all processes after the same step.

    A process that waited alone would leave the others in a collective operation, until that times out. Requests are
    therefore kept by the first process, and handed on wherever a run looks for them, which all do in step.
    """

    reaches_all = True

    def __init__(self) -> None:
        super().__init__()
        self._wanted = [False, False, False]
        self._reason = ""
        self._guard = threading.Lock()

    def take(self, request: Mapping[str, Any]) -> None:
        """Notes a request in the first process; may come from any thread.

        Args:
            request: ``stop`` and ``reason``, ``pause``, ``save``; what is left out stays.
        """
        with self._guard:
            for place, name in ((_STOP, "stop"), (_PAUSE, "pause"), (_SAVE, "save")):
                self._wanted[place] = bool(request.get(name, self._wanted[place]))
            self._reason = str(request.get("reason", self._reason))

    @property
    def writes(self) -> bool:  # type: ignore[override]  # a constant where there is one process
        """Whether this process writes what is saved."""
        return is_main_process()

    def wait_for_stop(self, timeout: float) -> bool:
        """Waits until the run is to end after the step that it has just done, at most ``timeout`` seconds.

        Returns:
            Whether that came about: a run whose step does not end hears of no request.
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
        if save:  # in each of them: of a sharded model all have a part, and the first one writes
            self.request_save()
