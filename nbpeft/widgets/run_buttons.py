"""The buttons Pause, Stop and Save now of one run. They work while the cell runs, and disappear when the run ends.

Pause and Resume are two buttons in one place, of which one is visible: a late click still has the meaning of the button
that was clicked, even if the other one is visible by then. Resume replaces Pause only when the run has paused, so that
an impatient second click on Pause does not hit Resume.
"""

from __future__ import annotations

import functools
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from nbpeft.display.blocks import CURRENT, SAVED
from nbpeft.widgets.click_delivery import Delivery, deliver_clicks
from nbpeft.widgets.environment import WIDGET_VIEW
from nbpeft.widgets.lifetime import close_tree, view_of, weakly
from nbpeft.widgets.styles import RUN_BUTTONS_CSS

if TYPE_CHECKING:
    from nbpeft.session import RunControl


PERIOD = 30.0
"""The shortest time for which a card counts as current without an update, in seconds."""


class RunButtons:
    """Shows the buttons and passes clicks on to the run's control until ``close``.

    A click is handled once: from the raw message if the kernel allows to inspect it (see ``click_delivery``),
    otherwise from the widget's handler. In the first case the kernel delivers the same click again, to the
    handler, when the cell has ended, where it does nothing. The widgets stay open until then, hidden, because the
    kernel would log an error about an unknown comm.

    Args:
        control: Receives the requests to stop, pause, resume and save.
        members: Adapters of a sweep, each of which gets its own buttons Stop and Clone.
        stop_tooltip: Shows Stop alone, with this tooltip, for work that can neither pause nor save.
    """

    def __init__(self, control: RunControl, members: Iterable[str] = (), *, stop_tooltip: str = "") -> None:
        import ipywidgets

        self._control = control
        self._lock = threading.Lock()
        self._seen = self._handled = 0
        self._ended = False
        self._shown: tuple[object, ...] = (False,) * 4 + (frozenset(),) * 2

        self.pause = _button("Pause", "pause", "Wait after this step")
        self.resume = _button("Resume", "play", "Continue the run", "none")
        kept = "End the run after this step and keep the weights trained so far"
        self.stop = _button("Stop", "stop", stop_tooltip or kept)
        self.save = _button("Save now", "save", "Save the adapter after this step and continue")
        self.members: dict[str, Any] = {}
        self.clones: dict[str, Any] = {}
        layout = ipywidgets.Layout(flex_flow="row wrap", overflow="visible")
        self.name = f"nbpeft-{uuid.uuid4().hex[:12]}"
        self._style = ipywidgets.HTML(layout=ipywidgets.Layout(display="none"))
        self._period, self._card = -1, ""
        shown = [self.stop] if stop_tooltip else [self.pause, self.resume, self.stop, self.save]
        self.box = ipywidgets.HBox([self._style, *shown], layout=layout)
        self.box.add_class("nbpeft-run")
        self.box.add_class(f"{self.name}-view")
        self.period()
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
        self._display: Any = None

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

    def period(self) -> int:
        """The number of the current period of time, which becomes part of the class name of a card drawn now.

        The style rules show a card of this period or the next as current. A card in a page that no update reaches, e.g.
        one opened from a file, keeps its number, which is soon too old.
        """
        now = int(time.time() // PERIOD)
        if now != self._period and not self._ended:
            self._period = now
            cards = [f"{self._alive} .{self.name}-{number}" for number in (now, now + 1)]
            rules = [f"{', '.join(f'{card} .{CURRENT}' for card in cards)} {{ display: inline !important; }}"]
            rules += [f"{', '.join(f'{card} .{SAVED}' for card in cards)} {{ display: none; }}"]
            self._style.value = f"<style>{RUN_BUTTONS_CSS}{' '.join(rules)}</style>"
        return now

    @property
    def _alive(self) -> str:
        """The CSS selector of a page on which these widgets are connected."""
        return f":root:has(.{self.name}-view:not(.jupyter-widgets-disconnected))"

    def show(self) -> None:
        """Displays the buttons in the running cell."""
        from IPython.display import display

        bundle = {WIDGET_VIEW: view_of(self.box), "text/plain": "Pause, Stop, Save now"}
        self._display = display(bundle, raw=True, display_id=True)

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

    def close(self, card: str = "") -> None:
        """Removes the buttons. May be called twice.

        Args:
            card: The final state of the run, as HTML. A page that was closed before the run ended shows it in the place
                of the buttons when it is opened again, instead of the state it was closed with.
        """
        if self._ended:
            return
        self._ended, self._card = True, card
        if self._control.deliver_clicks == self._poll:
            self._control.deliver_clicks = self._previous_poll
        if self._delivery is not None:
            self._delivery.close()
        if self._display is not None:
            self._display.update({"text/html": "", "text/plain": ""}, raw=True)
        with self._lock:
            waiting = self._seen > self._handled
        if waiting:
            _waiting.add(self)
        else:
            self._free()

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
            last = self._ended and self._handled >= self._seen
        if missed:
            self._ask(request)
        if last:
            self._free()

    def _ask(self, request: Callable[[], None]) -> None:
        if not self._ended:
            request()

    def _poll(self) -> None:
        if self._delivery is not None:
            self._delivery.poll()
        self.sync()

    def _free(self) -> None:
        _waiting.discard(self)
        if not self._card:
            close_tree(self.box)
            return
        import ipywidgets

        children = self.box.children
        for child in children:
            child.layout.display = "none"  # not closed: for a late click the kernel would log an unknown comm
        hidden = f"<style>{self._alive} .{self.name} {{ display: none; }}</style>"
        self.box.children = (ipywidgets.HTML(f"{hidden}{self._card}"), *children)
        _left.append(self.box)
        while len(_left) > _MOST_LEFT:
            close_tree(_left.popleft())


def _button(description: str, icon: str, tooltip: str, display: str | None = None) -> Any:
    import ipywidgets

    layout = ipywidgets.Layout(width="auto", display=display)
    return ipywidgets.Button(description=description, icon=icon, tooltip=tooltip, layout=layout)


_left: deque[Any] = deque()
"""The widgets that replace the buttons of runs that have ended."""
_MOST_LEFT = 16


def close_left() -> None:
    """Closes the widgets that replace the buttons of ended runs."""
    while _left:
        close_tree(_left.popleft())


_waiting: set[RunButtons] = set()
"""Buttons of ended runs whose clicks the kernel has yet to deliver. Handlers have only weak references: this keeps the
buttons alive."""
