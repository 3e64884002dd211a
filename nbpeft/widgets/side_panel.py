"""The buttons of the adapters panel that open the compare and the blend panel below it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets

from nbpeft.widgets.blend_panel import BlendPanel
from nbpeft.widgets.compare_panel import ComparePanel
from nbpeft.widgets.controls import button, mark
from nbpeft.widgets.lifetime import close_tree, weakly

if TYPE_CHECKING:
    from nbpeft.session import Session
    from nbpeft.widgets.answer_panel import AnswerPanel

_KINDS: dict[str, tuple[type[AnswerPanel], str]] = {
    "Compare answers": (ComparePanel, "Let the base model and the adapters answer the same prompt"),
    "Blend adapters": (BlendPanel, "Weight adapters with sliders and see what they answer together"),
}


class SidePanel:
    """Two buttons, and a place below that holds at most one of the panels.

    Args:
        session: Of the panel.
        model_name: Of the panel.
        tokenizer: A tokenizer, or a function that gives one.
        changed: Called when what the panel shows has changed.
    """

    def __init__(
        self, session: Session, model_name: str | None, tokenizer: Any, changed: Callable[[Any], None]
    ) -> None:
        self._changed = changed
        self._session, self._name, self._tokenizer = session, model_name, tokenizer
        self._panel: AnswerPanel | None = None
        self._buttons = {kind: button(kind, words, weakly(self._toggle, kind)) for kind, (_, words) in _KINDS.items()}
        self.buttons = ipywidgets.HBox(list(self._buttons.values()), layout=ipywidgets.Layout(flex="0 1 auto"))
        self.buttons.add_class("nbpeft-foot")
        self.slot = ipywidgets.VBox([], layout=ipywidgets.Layout(width="100%", overflow="visible"))

    @property
    def panel(self) -> AnswerPanel | None:
        """The panel that is open."""
        return self._panel

    def close(self) -> None:
        """Closes the panel that is open."""
        panel, self._panel = self._panel, None
        roots, self.slot.children = self.slot.children, ()
        if panel is not None:
            panel.close()
        for root in roots:  # one that is shown elsewhere by now left a line here
            close_tree(root)
        self._mark()

    def _toggle(self, kind: str) -> None:
        # One that is shown elsewhere by now was closed here: the button brings it back.
        shown = isinstance(self._panel, _KINDS[kind][0]) and not self._panel.closed
        prompt = self._panel.prompt if self._panel is not None else ""
        self.close()
        if shown:
            self._changed(None)
            return
        make = _KINDS[kind][0]
        self._panel = make(self._session, self._name, ui="widgets", tokenizer=self._tokenizer, prompt=prompt)
        root = self._panel.widget
        root.add_class("nbpeft-inner")
        self.slot.children = (root,)
        self._panel.on_change = functools.partial(self._changed, None)
        self._mark()
        self._changed(None)

    def _mark(self) -> None:
        for kind, made in self._buttons.items():
            mark(made, "nbpeft-on", isinstance(self._panel, _KINDS[kind][0]))
