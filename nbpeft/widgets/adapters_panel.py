"""The adapters of one model: what is there, what it costs, and buttons to switch, save and delete.

    session ── SessionState ──> AdaptersPanel ── draws only what changed ──> widgets
       ^                                                                        |
       └──────────── use, off, save, delete, memory ── a click ─────────────────┘

The panel never changes what it shows by itself: it asks the session and waits for the next state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import Block, Stack, Text, dim, line
from nbpeft.display.html import head, to_html
from nbpeft.display.memory import memory_bar
from nbpeft.display.models import (
    missing_model,
    model_card,
    model_summary,
    model_text,
    model_title,
    no_adapters,
    totals,
)
from nbpeft.errors import NbpeftError
from nbpeft.session.results.comparing import BASE
from nbpeft.state import ModelState, SessionState
from nbpeft.widgets.environment import Ui
from nbpeft.widgets.lifetime import weakly
from nbpeft.widgets.panel import SessionPanel

if TYPE_CHECKING:
    from nbpeft.session import Session


class AdaptersPanel(SessionPanel):
    """One row an adapter, what they cost together, and a switch.

    Args:
        session: Takes the commands, publishes the states.
        model_name: A model of the session; the current one by default.
        ui: How to show it; by default the richest that works here.
        tokenizer: For the compare and the blend panel that open below: a tokenizer, or a function that
            gives one; by default the one that the session was given last.
    """

    kind: ClassVar[str] = "adapters"

    def __init__(
        self, session: Session, model_name: str | None = None, *, ui: Ui = "auto", tokenizer: Any = None
    ) -> None:
        super().__init__(session, model_name, ui)
        self._tokenizer = tokenizer

    def _build(self) -> _Parts:
        return _Parts(self._command, self._session, self._name, self._tokenizer, weakly(self._changed))

    def _release(self, parts: Any) -> None:
        super()._release(parts)
        parts.side_panel.close()

    def _text(self) -> str:
        return model_text(self._model(), self._name)

    def _card(self, hint: str) -> Block:
        beside = self._parts.side_panel.panel if self._parts is not None else None
        shown = model_card(self._model(), self._name, hint=hint)
        return Stack((shown, beside.card())) if beside is not None and not beside.closed else shown

    def _draw(self, state: SessionState) -> None:
        self._parts.draw(state.model(self._name), self._name, state.busy)

    def _run(self, *command: Any) -> str:
        session, model = self._session, self._name
        what, *arguments = command
        self._offer_undo(False)
        if what == "use":
            return _notes(session.use(arguments[0], model=model))
        if what == "off":
            return _notes(session.off(model=model))
        if what == "delete":
            deleted = session.delete(arguments[0], model=model)
            self._offer_undo(True)
            return _line(deleted)
        if what == "undo":
            return _line(session.undo(model=model))
        if what == "save":
            name, folder = arguments
            if not folder:
                raise NbpeftError(f"Give a folder to save {name!r} to.")
            return str(session.save(folder, name=name, model=model))
        session.memory(model)
        return ""

    def _offer_undo(self, wanted: bool) -> None:
        with self._lock:
            if self._parts is not None:
                self._parts.offer_undo(wanted)


class _Parts:
    """The widgets of a panel."""

    def __init__(
        self,
        command: Callable[..., None],
        session: Session,
        name: str | None,
        tokenizer: Any,
        changed: Callable[[Any], None],
    ) -> None:
        import ipywidgets

        from nbpeft.widgets import controls as parts
        from nbpeft.widgets.side_panel import SidePanel

        self.side_panel = SidePanel(session, name, tokenizer, changed)

        self._head = parts.html()
        self._choices = parts.ToggleRow(command, "0 0 6px 0")
        self._rows = parts.Rows(command)
        self._empty = parts.html()
        self._totals = parts.html()
        self._memory = parts.html()
        self._refresh = parts.small_button(
            "measure memory", "Measure what the model uses now", "116px", weakly(command, "memory")
        )
        self.message = parts.Message()
        self._undo = parts.small_button("Undo", "Bring the deleted adapter back", "58px", weakly(command, "undo"))
        *words, dismiss = self.message.box.children
        self.message.box.children = (*words, self._undo, dismiss)
        buttons = ipywidgets.HBox([self._refresh, self.side_panel.buttons], layout=ipywidgets.Layout(flex="0 0 auto"))
        foot = ipywidgets.HBox(
            [self._totals, buttons],
            layout=ipywidgets.Layout(justify_content="space-between", align_items="flex-end"),
        )
        below = [foot, self._memory, self.message.box, self.side_panel.slot]
        self.root = parts.panel_root(self._head, self._choices.box, self._rows.box, self._empty, *below)

    def offer_undo(self, wanted: bool) -> None:
        """Shows the button that brings back what was deleted, beside the message that says so."""
        self._undo.layout.display = None if wanted else "none"

    def draw(self, model: ModelState | None, name: str | None, busy: str) -> None:
        """Shows a state; widgets whose value stays send nothing."""
        title = model_title(model) if model is not None else name or "model"
        aside = Text(f"{busy} …", "accent") if busy else dim(model_summary(model) if model is not None else "")
        self._head.value = head(title, aside, below=8)
        if model is None:
            model = ModelState(name or "", "", "", "", 0, 0)
            self._empty.value = to_html(line(dim(missing_model(name))))
            self._totals.value = self._memory.value = ""
        else:
            self._empty.value = "" if model.adapters else to_html(line(dim(no_adapters(model))))
            self._totals.value = to_html(totals(model))
            self._memory.value = to_html(memory_bar(model.memory)) if model.memory is not None else ""
        choices: dict[tuple[str, ...], tuple[str, str]]
        choices = {("off",): (BASE, "Only the base model is active")}
        choices |= {("use", item.name): (item.name, f"Switch to {item.name}") for item in model.adapters}
        self._choices.draw(choices, [("use", name) for name in model.active] or [("off",)])
        self._rows.draw(model)
        visible = None if model.adapters else "none"
        for part in (self._choices.box, self._refresh, self.side_panel.buttons):
            part.layout.display = visible


def _line(result: Any) -> str:
    """What a result reports without its notes, which speak of commands: here there are buttons."""
    return str(getattr(result, "line", result))


def _notes(result: Any) -> str:
    """What a result reports besides that it was done."""
    return " ".join(getattr(result, "notes", ()))
