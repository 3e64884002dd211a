"""Answers while a cell runs: HTML pushed into one output, which is cleared when the cell shows the final result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbpeft.display.html import to_html
from nbpeft.widgets.environment import WIDGET_VIEW, Ui, shown_as
from nbpeft.widgets.lifetime import view_of
from nbpeft.widgets.run_buttons import RunButtons

if TYPE_CHECKING:
    from nbpeft.display.shown import Shown
    from nbpeft.session import RunControl

_EMPTY = {"text/html": "", "text/plain": ""}
HINT = "Interrupting the kernel keeps the answers so far."


class LiveAnswers:
    """Draws the answers so far, or another result so far, in the running cell.

    Args:
        ui: How to show them; as text nothing is shown before the answers are complete.
    """

    def __init__(self, *, ui: Ui = "auto") -> None:
        self._shown_as = shown_as(ui)
        self._output: Any = None
        self._buttons: RunButtons | None = None
        self._outputs: list[Any] = []

    def stop_with(self, control: RunControl) -> None:
        """Shows a button that asks for a stop, where buttons can be shown."""
        if self._shown_as == "widgets":
            self._buttons = RunButtons(control, stop_tooltip="Stop here and keep what is done")
            self._show({**_EMPTY, WIDGET_VIEW: view_of(self._buttons.box)})

    def draw(self, result: Shown) -> None:
        """Shows the answers so far."""
        if self._shown_as == "text":
            return
        bundle = {"text/html": to_html(result.view()), "text/plain": HINT}
        if self._output is None:
            self._output = self._show(bundle)
        else:
            self._output.update(bundle, raw=True)

    def close(self) -> None:
        """Clears the outputs, and hides the button."""
        if self._buttons is not None:
            self._buttons.close()
        self._output = None
        while self._outputs:
            self._outputs.pop().update(_EMPTY, raw=True)

    def _show(self, bundle: dict[str, Any]) -> Any:
        """Displays an output, which ``close`` clears."""
        from IPython.display import display

        output = display(bundle, raw=True, display_id=True)
        if output is not None:  # outside a notebook there is none
            self._outputs.append(output)
        return output
