"""The buttons of the adapters panel that open the compare or the blend panel below it."""

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
    "Compare answers": (ComparePanel, "Compare the answers of the base model and the adapters to one prompt"),
    "Blend adapters": (BlendPanel, "Weight adapters with sliders and see the answer of their sum"),
}


class SidePanel:
    """Two buttons, and a place below that holds at most one of the panels.

    Args:
        session: The session of the panel.
        model_name: The model of the panel.
        tokenizer: A tokenizer, or a function that returns one.
        changed: Called when the content of the open panel has changed.
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
        """The open panel, or None."""
        return self._panel

    def close(self) -> None:
        """Closes the open panel."""
        panel, self._panel = self._panel, None
        roots, self.slot.children = self.slot.children, ()
        if panel is not None:
            panel.close()
        for root in roots:  # a panel that moved to another cell left its root here, with a line of text
            close_tree(root)
        self._mark()

    def _toggle(self, kind: str) -> None:
        # A panel that moved to another cell counts as closed here: a click opens it here again.
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
        for kind, opener in self._buttons.items():
            mark(opener, "nbpeft-on", isinstance(self._panel, _KINDS[kind][0]))
