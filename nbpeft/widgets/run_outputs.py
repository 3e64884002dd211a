"""The outputs in which the live view of a run draws its card: widgets, HTML, or a line of text.

With widgets the card exists twice. The kernel keeps the one in a widget up to date: a page that is opened again while
the kernel runs gets it from there. The other one is HTML that is saved with the notebook. It is updated less often,
hidden while the widget is connected, and says when the run was last seen.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from nbpeft.display.training import training_text
from nbpeft.state import ENDED, TrainState
from nbpeft.widgets.lifetime import close_tree, send_tree
from nbpeft.widgets.panel_output import PanelOutput
from nbpeft.widgets.run_buttons import RunButtons
from nbpeft.widgets.styles import RUN_CSS

_INTERVAL = 2.0
"""The shortest time between two updates of the card that is saved with the notebook, in seconds."""

Card = Callable[[TrainState, str], str]
"""Returns the card of a state as HTML; the second argument is the current time, or empty for a card that is live."""


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")


def _bundle(card: Card, train: TrainState) -> dict[str, str]:
    """A state as a MIME bundle that can be saved."""
    seen = _now()
    return {"text/html": card(train, seen), "text/plain": training_text(train, seen=seen)}


class RunOutput:
    """Where a view draws."""

    def draw(self, train: TrainState) -> None:
        """Shows a state."""
        raise NotImplementedError

    def resend(self) -> None:
        """Sends the last state again."""

    def flush(self) -> None:
        """Sends the last state now if it waits for the shortest time between two updates."""

    def end(self) -> None:
        """Removes what only a running run needs; the last state stays, and further states may follow."""

    def close(self) -> None:
        """Ends the output; the last state stays."""


class WidgetOutput(RunOutput):
    """The card in a widget above the buttons, and the card that is saved."""

    def __init__(self, card: Card, buttons: RunButtons, train: TrainState) -> None:
        import ipywidgets

        self._card, self._buttons, self._train = card, buttons, train
        self._widget = ipywidgets.HTML(card(train, ""), layout=ipywidgets.Layout(margin="0"))
        self._output = PanelOutput(lambda: _bundle(card, self._train), threading.RLock(), interval=_INTERVAL)
        style = ipywidgets.HTML(f"<style>{RUN_CSS}{self._output.css}</style>", layout=ipywidgets.Layout(display="none"))
        self.root = ipywidgets.VBox([style, self._widget, buttons.box])
        self.root.add_class("nbpeft-run")
        self._output.show(self.root)

    def draw(self, train: TrainState) -> None:
        """Shows a state."""
        self._train = train
        self._widget.value = self._card(train, "")
        self._output.changed()

    def resend(self) -> None:
        """Sends the widgets and the card that is saved again."""
        send_tree(self.root)
        self._output.resend()

    def flush(self) -> None:
        """Sends the card that is saved now if it waits for the shortest time between two updates."""
        self._output.flush()

    def end(self) -> None:
        """Hides the buttons. An open page shows the card that is saved, so that the file has no view of a widget."""
        self._buttons.close()
        self._output.only_state()

    def close(self) -> None:
        """Closes the widgets."""
        self._buttons.close()
        self._output.close()
        close_tree(self.root)


class HtmlOutput(RunOutput):
    """One output that is updated in place."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._handle: Any = None
        self._bundle: dict[str, str] = {}

    def draw(self, train: TrainState) -> None:
        """Shows a state."""
        from IPython.display import display

        self._bundle = _bundle(self._card, train)
        if self._handle is None:
            self._handle = display(self._bundle, raw=True, display_id=True)
        else:
            self.resend()

    def resend(self) -> None:
        """Sends the last state again."""
        if self._handle is not None:
            self._handle.update(self._bundle, raw=True)


class TextOutput(RunOutput):
    """One line that is overwritten in a terminal; in a file, a new line every ten seconds.

    Args:
        stream: Where it is written; by default the standard output.
    """

    seconds = 10.0

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._width = 0
        self._written_at = float("-inf")

    def draw(self, train: TrainState) -> None:
        """Shows a state."""
        line, ended = training_text(train), train.status in ENDED
        if self._stream.isatty():
            columns = shutil.get_terminal_size().columns - 1
            # A line that wraps cannot be overwritten.
            line = line if len(line) <= columns else line[: columns - 1] + "…"
            self._stream.write(f"\r{line:<{self._width}}" + ("\n" if ended else ""))
            self._width = len(line)
        elif ended or time.monotonic() - self._written_at >= self.seconds:
            self._stream.write(f"{line}\n")
            self._written_at = time.monotonic()
        self._stream.flush()
