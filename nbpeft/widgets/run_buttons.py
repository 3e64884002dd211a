"""Pause, Stop and Save now of one run. They work while the cell runs, and vanish with the run.

Pause and Resume are two buttons in one place, of which one is seen: a click means what its button says
even when it arrives after the other has taken the place. Resume takes it when the run waits and not before, so that
an impatient second click on Pause is none on Resume.
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
"""Seconds for which a card is taken for current without an update, at least."""


class RunButtons:
    """Shows the buttons and hands clicks on to the run's control until ``close``.

    A click is noted once: from the raw message where the kernel lets us look, otherwise from
    the widget's handler. The same click comes again, through the handler, when the cell is done; the
    widgets stay alive for it (unseen), so that the kernel does not complain about an unknown
    comm, and it does nothing.

    Args:
        control: Where Stop and Pause are asked for.
        members: Adapters of a sweep, each of which gets a Stop and a Clone of its own.
    """

    def __init__(self, control: RunControl, members: Iterable[str] = ()) -> None:
        import ipywidgets

        self._control = control
        self._lock = threading.Lock()
        self._seen = self._handled = 0
        self._ended = False
        self._shown: tuple[object, ...] = (False,) * 4 + (frozenset(),) * 2

        self.pause = _button("Pause", "pause", "Wait after this step")
        self.resume = _button("Resume", "play", "Go on", "none")
        self.stop = _button("Stop", "stop", "End the run after this step and keep what was learned")
        self.save = _button("Save now", "save", "Save the adapter after this step and go on")
        self.members: dict[str, Any] = {}
        self.clones: dict[str, Any] = {}
        layout = ipywidgets.Layout(flex_flow="row wrap", overflow="visible")
        self.name = f"nbpeft-{uuid.uuid4().hex[:12]}"
        self._style = ipywidgets.HTML(layout=ipywidgets.Layout(display="none"))
        self._period, self._card = -1, ""
        self.box = ipywidgets.HBox([self._style, self.pause, self.resume, self.stop, self.save], layout=layout)
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
        """Lets clicks on buttons be requests."""
        self._requests |= requests
        for clicked, request in requests.items():
            clicked.on_click(weakly(self._clicked, request))
        if self._delivery is not None and (listeners := self._listeners(requests)) is not None:
            self._delivery.add(listeners)

    def _add(self, members: Iterable[str]) -> None:
        """Makes buttons for adapters of a sweep that have none: one may have been cloned meanwhile."""
        requests: dict[Any, Callable[[], None]] = {}
        for name in members:
            if name in self.members:
                continue
            stop = _button(f"Stop {name}", "stop", f"Let {name} learn no more, and the others go on")
            clone = _button(f"Clone {name}", "clone", f"Let a copy of {name} learn on too, at half the learning rate")
            self.members[name], self.clones[name] = stop, clone
            requests[stop] = functools.partial(self._control.request_stop_of, name)
            requests[clone] = functools.partial(self._control.request_clone_of, name)
        if requests:
            self._take(requests)
            self.box.children = (*self.box.children, *requests)

    def period(self) -> int:
        """The number of the present time, with which a card is framed that is seen as current now.

        A card of this period or the next is seen as current. One that a page was opened with, and that no update
        reaches, has an older number soon.
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
        """Selects a page on which these widgets live."""
        return f":root:has(.{self.name}-view:not(.jupyter-widgets-disconnected))"

    def show(self) -> None:
        """Displays the buttons in the running cell."""
        from IPython.display import display

        bundle = {WIDGET_VIEW: view_of(self.box), "text/plain": "Pause, Stop, Save now"}
        self._display = display(bundle, raw=True, display_id=True)

    def sync(self, members: Iterable[str] = ()) -> None:
        """Lets the buttons say what was asked for. May be called in any thread.

        Args:
            members: adapters of a sweep, among them those that are new.
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
        """Whether clicks are seen during a step only where a thread calls ``peek`` often."""
        return self._delivery is not None and self._delivery.needs_peeking

    def peek(self) -> None:
        """Looks for clicks while the main thread is inside a step."""
        if self._delivery is not None:
            self._delivery.peek()

    def close(self, card: str = "") -> None:
        """Takes the buttons away. May be called twice.

        Args:
            card: how the run ended, as HTML: a page that was closed at that time and is opened again shows it in the
                place of the buttons, and not the state that it was closed with.
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
        """What to call for a click, by comm id; None where widgets have none."""
        found = {getattr(button.comm, "comm_id", None): request for button, request in requests.items()}
        if None in found:
            return None
        return {str(comm_id): functools.partial(self._peeked, request) for comm_id, request in found.items()}

    def _peeked(self, request: Callable[[], None]) -> None:
        with self._lock:
            self._seen += 1
        self._ask(request)

    def _clicked(self, request: Callable[[], None]) -> None:
        with self._lock:
            self._handled += 1
            missed = self._handled > self._seen  # nobody looked at it on its way
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
            child.layout.display = "none"  # and not closed: the kernel would complain about a click that comes late
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
"""What stands in the place of the buttons of runs that have ended."""
_MOST_LEFT = 16


def close_left() -> None:
    """Closes it."""
    while _left:
        close_tree(_left.popleft())


_waiting: set[RunButtons] = set()
"""Buttons of ended runs whose clicks the kernel has yet to deliver; held here, as handlers are weak."""
