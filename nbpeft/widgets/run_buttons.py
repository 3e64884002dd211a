"""The buttons Pause, Stop and Save now of one run. They work while the cell runs, and are hidden when the run ends.

Pause and Resume are two buttons in one place, of which one is visible: a late click still has the meaning of the button
that was clicked, even if the other one is visible by then. Resume replaces Pause only when the run has paused, so that
an impatient second click on Pause does not hit Resume.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from nbpeft.display.blocks import Span, dim
from nbpeft.display.html import span
from nbpeft.display.training import member_rows
from nbpeft.state import TrainState
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
        train: The first state; each adapter of a sweep gets a row with its figures and buttons Stop and Clone.
        stop_tooltip: Shows Stop alone, with this tooltip, for work that can neither pause nor save.
    """

    def __init__(self, control: RunControl, train: TrainState | None = None, *, stop_tooltip: str = "") -> None:
        import ipywidgets

        self._control = control
        self._lock = threading.Lock()
        self._seen = self._handled = 0
        self._ended = False
        self._shown: tuple[object, ...] = (False,) * 4 + (frozenset(),) * 2

        self.pause = _button("Pause", "pause", "Pause after this step")
        self.resume = _button("Resume", "play", "Continue the run", "none")
        kept = "End the run after this step and keep the weights trained so far"
        self.stop = _button("Stop", "stop", stop_tooltip or kept)
        self.save = _button("Save now", "save", "Save the adapter after this step and continue")
        self.members: dict[str, Any] = {}
        self.clones: dict[str, Any] = {}
        self._rows: dict[str, tuple[Any, Any]] = {}
        self._titles = ipywidgets.HTML(layout=ipywidgets.Layout(margin="0"))
        self.table = ipywidgets.VBox([self._titles], layout=ipywidgets.Layout(display="none"))
        self.table.add_class("nbpeft-members")
        layout = ipywidgets.Layout(flex_flow="row wrap", overflow="visible")
        shown = [self.stop] if stop_tooltip else [self.pause, self.resume, self.stop, self.save]
        buttons = ipywidgets.HBox(shown, layout=layout)
        buttons.add_class("nbpeft-buttons")
        self.box = ipywidgets.VBox([buttons, self.table], layout=ipywidgets.Layout(overflow="visible"))
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
        self._draw(train)
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

    def _draw(self, train: TrainState | None) -> None:
        """Shows the adapters of a sweep, the best first; adapters that have no row yet get one, e.g. a new clone."""
        if train is None or not train.members:
            return
        head, rows, figures = member_rows(train)
        self._titles.value = _row_of([dim(title) for title in head], figures)
        requests: dict[Any, Callable[[], None]] = {}
        for name, _ in rows:
            if name not in self._rows:
                requests |= self._row(name)
        if requests:
            self._take(requests)
        for name, cells in rows:
            self._rows[name][1].value = _row_of(cells, figures)
        wanted = (self._titles, *(self._rows[name][0] for name, _ in rows))
        if self.table.children != wanted:
            self.table.children = wanted
        self.table.layout.display = None

    def _row(self, name: str) -> dict[Any, Callable[[], None]]:
        """Creates the row of an adapter, and returns its buttons with their requests."""
        import ipywidgets

        stop = _button("Stop", "stop", f"Stop training {name}; the others continue")
        clone = _button("Clone", "clone", f"Train a copy of {name} as well, at half the learning rate")
        cells = ipywidgets.HTML(layout=ipywidgets.Layout(margin="0", flex="1 1 auto", min_width="0"))
        row = ipywidgets.HBox([cells, stop, clone])
        row.add_class("nbpeft-member")
        self._rows[name], self.members[name], self.clones[name] = (row, cells), stop, clone
        return {
            stop: functools.partial(self._control.request_stop_of, name),
            clone: functools.partial(self._control.request_clone_of, name),
        }

    def sync(self, train: TrainState | None = None) -> None:
        """Updates labels and states of the buttons to the pending requests. May be called in any thread.

        Args:
            train: The current state, with all adapters of a sweep; None if it has not changed.
        """
        control = self._control
        if not self._ended:
            self._draw(train)
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


def _row_of(cells: Sequence[Span], figures: Collection[int]) -> str:
    """A row of the table of adapters as HTML; its last cell is the adapter's status."""
    columns = f"minmax(90px,2fr) repeat({len(cells) - 2},minmax(64px,1fr)) minmax(90px,1.4fr)"
    drawn = "".join(
        f'<div style="padding:3px 6px{";text-align:right;white-space:nowrap" if place in figures else ""}">'
        f"{span(cell)}</div>"
        for place, cell in enumerate(cells)
    )
    return f'<div style="display:grid;grid-template-columns:{columns};align-items:center">{drawn}</div>'


def _button(description: str, icon: str, tooltip: str, display: str | None = None) -> Any:
    import ipywidgets

    layout = ipywidgets.Layout(width="auto", display=display)
    return ipywidgets.Button(description=description, icon=icon, tooltip=tooltip, layout=layout)
