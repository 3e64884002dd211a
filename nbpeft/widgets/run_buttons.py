"""The buttons Pause, Stop and Save now of one run. They work while the cell runs, and are hidden when the run ends.

Pause and Resume are two buttons in one place, of which one is visible: a late click still has the meaning of the button
that was clicked, even if the other one is visible by then. Resume replaces Pause only when the run has paused, so that
an impatient second click on Pause does not hit Resume.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from nbpeft.widgets.click_delivery import Delivery, deliver_clicks
from nbpeft.widgets.lifetime import weakly

if TYPE_CHECKING:
    from nbpeft.session import RunControl


class RunButtons:
    """Has the buttons in ``box``, and passes clicks on to the run's control until ``close``.

    A click is handled once: from the raw message if the kernel allows to inspect it (see ``click_delivery``),
    otherwise from the widget's handler. In the first case the kernel delivers the same click again, to the
    handler, when the cell has ended, where it does nothing. So ``close`` only hides the buttons: for a click on a
    closed widget the kernel would log an error about an unknown comm.

    Args:
        control: Receives the requests to stop, pause, resume and save.
        members: Adapters of a sweep, each of which gets its own buttons Stop and Clone.
    """

    def __init__(self, control: RunControl, members: Iterable[str] = ()) -> None:
        import ipywidgets

        self._control = control
        self._lock = threading.Lock()
        self._seen = self._handled = 0
        self._ended = False
        self._shown: tuple[object, ...] = (False,) * 4 + (frozenset(),) * 2

        self.pause = _button("Pause", "pause", "Wait after this step")
        self.resume = _button("Resume", "play", "Continue the run", "none")
        self.stop = _button("Stop", "stop", "End the run after this step and keep the weights trained so far")
        self.save = _button("Save now", "save", "Save the adapter after this step and continue")
        self.members: dict[str, Any] = {}
        self.clones: dict[str, Any] = {}
        layout = ipywidgets.Layout(flex_flow="row wrap", overflow="visible")
        self.box = ipywidgets.HBox([self.pause, self.resume, self.stop, self.save], layout=layout)
        self._requests: dict[Any, Callable[[], None]] = {}
        self._delivery: Delivery | None = None
        self._take(
            {
                self.pause: control.pause,
                self.resume: control.resume,
                self.stop: control.request_stop,
                self.save: control.request_save,
            }
        )
        self._add(members)
        self._delivery = self._listen()
        self._previous_poll = control.deliver_clicks
        control.deliver_clicks = self._poll

    def _take(self, requests: dict[Any, Callable[[], None]]) -> None:
        """Connects the buttons with the requests that their clicks make."""
        self._requests |= requests
        for clicked, request in requests.items():
            clicked.on_click(weakly(self._clicked, request))
        if self._delivery is not None and (listeners := self._listeners(requests)) is not None:
            self._delivery.add(listeners)

    def _add(self, members: Iterable[str]) -> None:
        """Creates buttons for adapters of a sweep that have none yet, e.g. for a new clone."""
        requests: dict[Any, Callable[[], None]] = {}
        for name in members:
            if name in self.members:
                continue
            stop = _button(f"Stop {name}", "stop", f"Stop training {name}; the others continue")
            clone = _button(
                f"Clone {name}", "clone", f"Continue training a copy of {name} as well, at half the learning rate"
            )
            self.members[name], self.clones[name] = stop, clone
            requests[stop] = functools.partial(self._control.request_stop_of, name)
            requests[clone] = functools.partial(self._control.request_clone_of, name)
        if requests:
            self._take(requests)
            self.box.children = (*self.box.children, *requests)

    def sync(self, members: Iterable[str] = ()) -> None:
        """Updates labels and states of the buttons to the pending requests. May be called in any thread.

        Args:
            members: All adapters of a sweep, including new ones.
        """
        control = self._control
        if not self._ended:
            self._add(members)
        flags = (control.paused, control.waiting, control.stop_requested, control.save_requested)
        wanted = (*flags, control.members_to_stop, control.members_to_clone)
        with self._lock:
            if self._ended or wanted == self._shown:
                return
            self._shown = wanted
        paused, waiting, stopping, saving = flags
        waits = paused and waiting
        self.pause.layout.display = "none" if waits else None
        self.resume.layout.display = None if waits else "none"
        self.pause.description = "Pausing…" if paused else "Pause"
        self.stop.description = "Stopping…" if stopping else "Stop"
        self.save.description = "Saving…" if saving else "Save now"
        self.pause.disabled = paused or stopping
        self.stop.disabled, self.save.disabled = stopping, saving
        for name, member in self.members.items():
            member.disabled = stopping or name in control.members_to_stop
            self.clones[name].disabled = member.disabled or name in control.members_to_clone

    @property
    def needs_peeking(self) -> bool:
        """Whether another thread has to call ``peek`` often for clicks to be noticed during a step."""
        return self._delivery is not None and self._delivery.needs_peeking

    def peek(self) -> None:
        """Checks for clicks while the main thread is inside a step; for another thread."""
        if self._delivery is not None:
            self._delivery.peek()

    def close(self) -> None:
        """Hides the buttons and ignores later clicks. May be called twice."""
        if self._ended:
            return
        self._ended = True
        if self._control.deliver_clicks == self._poll:
            self._control.deliver_clicks = self._previous_poll
        if self._delivery is not None:
            self._delivery.close()
        self.box.layout.display = "none"

    def _listen(self) -> Delivery | None:
        listeners = self._listeners(self._requests)
        return None if listeners is None else deliver_clicks(listeners)

    def _listeners(self, requests: dict[Any, Callable[[], None]]) -> dict[str, Any] | None:
        """Comm id of a button -> function to call for a click; None if a widget has no comm."""
        by_comm_id = {getattr(button.comm, "comm_id", None): request for button, request in requests.items()}
        if None in by_comm_id:
            return None
        return {str(comm_id): functools.partial(self._peeked, request) for comm_id, request in by_comm_id.items()}

    def _peeked(self, request: Callable[[], None]) -> None:
        with self._lock:
            self._seen += 1
        self._ask(request)

    def _clicked(self, request: Callable[[], None]) -> None:
        with self._lock:
            self._handled += 1
            missed = self._handled > self._seen  # its raw message was not inspected
            self._seen += missed
        if missed:
            self._ask(request)

    def _ask(self, request: Callable[[], None]) -> None:
        if not self._ended:
            request()

    def _poll(self) -> None:
        if self._delivery is not None:
            self._delivery.poll()
        self.sync()


def _button(description: str, icon: str, tooltip: str, display: str | None = None) -> Any:
    import ipywidgets

    layout = ipywidgets.Layout(width="auto", display=display)
    return ipywidgets.Button(description=description, icon=icon, tooltip=tooltip, layout=layout)
