"""The adapters of one model, their size and memory, and buttons to switch, save and delete.

    session ── SessionState ──> AdaptersPanel ── draws only what changed ──> widgets
       ^                                                                        |
       └──────────── use, off, save, delete ── a click ─────────────────────────┘

The panel never changes what it shows by itself: it asks the session and waits for the next state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import Block, Stack, Text, dim
from nbpeft.display.html import head, to_html
from nbpeft.display.memory import memory_bar
from nbpeft.display.models import model_card, model_summary, model_text, model_title, no_adapters, no_model, totals
from nbpeft.errors import AdapterExistsError, NbpeftError
from nbpeft.session.results.comparing import BASE
from nbpeft.state import MemoryState, ModelState, SessionState
from nbpeft.widgets.environment import Ui
from nbpeft.widgets.lifetime import weakly
from nbpeft.widgets.live_memory import LiveMemory
from nbpeft.widgets.panel import SessionPanel

if TYPE_CHECKING:
    from nbpeft.session import Session


class AdaptersPanel(SessionPanel):
    """One row for each adapter, their total size and memory, and buttons that choose the active one.

    Args:
        session: Runs the commands and publishes the states.
        model_name: A model of the session; the current one by default.
        ui: How to show it; by default the richest form that works here.
        tokenizer: For the compare and the blend panel that open below: a tokenizer, or a function that
            returns one; by default the one that the session used last.
    """

    kind: ClassVar[str] = "adapters"
    session_method: ClassVar[str] = "use"

    def __init__(
        self, session: Session, model_name: str | None = None, *, ui: Ui = "auto", tokenizer: Any = None
    ) -> None:
        super().__init__(session, model_name, ui)
        self._tokenizer = tokenizer
        self._memory: MemoryState | None = None
        self._drawn: tuple[ModelState | None, str] | None = None
        self._live = LiveMemory(self._measure, self._measured)

    def _build(self) -> _Parts:
        return _Parts(self._command, self._session, self._name, self._tokenizer, weakly(self._changed))

    def _opened(self) -> None:
        self._drawn = None
        super()._opened()

    def _release(self, parts: Any) -> None:
        super()._release(parts)
        self._live.stop()
        parts.side_panel.close()

    def _text(self) -> str:
        return model_text(self._model(), self._name)

    def _card(self, hint: str) -> Block:
        side_panel = self._parts.side_panel.panel if self._parts is not None else None
        model = self._model()
        if model is not None and self._memory is not None:
            model = dataclasses.replace(model, memory=self._memory)
        shown = model_card(model, self._name, hint=hint, brief=True)
        return Stack((shown, side_panel.card())) if side_panel is not None and not side_panel.closed else shown

    def _draw(self, state: SessionState) -> None:
        """Shows a state. During training states arrive five times a second: only what changed is drawn again."""
        model = state.model(self._name)
        shown = None if model is None else dataclasses.replace(model, training=None, memory=None)
        if (shown, state.busy) != self._drawn:
            self._drawn = (shown, state.busy)
            self._parts.draw(shown, self._name, state.busy)
            self._live.look(running=bool(state.busy))
            self._changed()

    def _measure(self) -> MemoryState | None:
        return self._session.measure(self._name) if self._model() is not None else None

    def _measured(self, memory: MemoryState | None) -> None:
        with self._lock:
            self._memory = memory
            if self._parts is not None:
                self._parts.draw_memory(memory)
                self._changed()

    def _run(self, *command: Any) -> str:
        session, model = self._session, self._name
        what, *arguments = command
        self._offer(None)
        if what == "use":
            return _notes(session.use(arguments[0], model=model))
        if what == "off":
            return _notes(session.use(BASE, model=model))
        if what == "delete":
            deleted = session.delete(arguments[0], model=model)
            self._offer("undo")
            return _line(deleted)
        if what == "undo":
            return _line(session.undo(model=model))
        if what == "save":
            name, folder = arguments
            if not folder:
                raise NbpeftError(f"Give a folder to save {name!r} to.")
            return self._save(name, folder, replace=False)
        if what == "replace":
            return self._save(*arguments, replace=True)
        self._parts.draw(self._session.state.model(model), model, session.state.busy)  # "filter"
        return ""

    def _save(self, name: str, folder: str, *, replace: bool) -> str:
        """Saves an adapter; if the folder already has another one, a button offers to replace it."""
        try:
            return str(self._session.save(folder, adapter=name, model=self._name, replace=replace))
        except AdapterExistsError as error:
            self._offer("replace", name, folder)
            raise NbpeftError(error.message.removesuffix(" (replace=…)")) from None

    def _offer(self, *command: str | None) -> None:
        """Shows the button of a command next to the message; no button for None."""
        with self._lock:
            if self._parts is not None:
                self._parts.offer(*command)


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
        from nbpeft.widgets.adapter_rows import Rows, SidePanel

        self.side_panel = SidePanel(session, name, tokenizer, changed)

        self._head = parts.html()
        self._choices = parts.ToggleRow(command, "choices", "0 0 6px 0")
        self._rows = Rows(command)
        self._empty = parts.html()
        self._totals = parts.html(flex="1 1 260px")
        self._memory = parts.html()
        self.message = parts.Message()
        self._command = command
        self._replacing: tuple[str, ...] = ()
        self._offers = {
            "undo": parts.button("Undo", "Restore the deleted adapter", weakly(command, "undo"), hides=True),
            "replace": parts.button(
                "Replace", "Overwrite the adapter in that folder", weakly(self._replace), "danger", hides=True
            ),
        }
        self.offer(None)
        *words, dismiss = self.message.box.children
        self.message.box.children = (*words, *self._offers.values(), dismiss)
        foot = ipywidgets.HBox([self._totals, self.side_panel.buttons])
        foot.add_class("nbpeft-foot")
        above = [self._choices.box, self._rows.filter_box, self._rows.box, self._empty]
        self.root = parts.panel_root(self._head, *above, foot, self._memory, self.message.box, self.side_panel.slot)

    def offer(self, what: str | None, *arguments: str) -> None:
        """Shows one of the buttons next to the message: ``undo``, or ``replace`` with an adapter and a folder."""
        if what == "replace":
            self._replacing = arguments
        for name, button in self._offers.items():
            button.layout.display = None if name == what else "none"

    def _replace(self) -> None:
        self._command("replace", *self._replacing)

    def draw(self, model: ModelState | None, name: str | None, busy: str) -> None:
        """Shows a state; widgets whose value does not change send no message to the front end."""
        title = model_title(model) if model is not None else name or "model"
        aside = Text(f"{busy} …", "accent") if busy else dim(model_summary(model) if model is not None else "")
        self._head.value = head(title, aside, below=8)
        if model is None:
            model = ModelState(name or "", "", "", "", 0, 0)
            self._empty.value = to_html(no_model(name))
            self._totals.value = ""
        else:
            self._empty.value = "" if model.adapters else to_html(no_adapters(model))
            self._totals.value = to_html(totals(model))
        seen = self._rows.draw(model)
        choices: dict[tuple[str, ...], tuple[str, str]]
        choices = {("off",): (BASE, "Only the base model is active")}
        choices |= {("use", name): (name, f"Switch to {name}") for name in _to_switch_to(model, seen)}
        self._choices.draw(choices, [("use", name) for name in model.active] or [("off",)])
        visible = None if model.adapters else "none"
        for part in (self._choices.box, self.side_panel.buttons):
            part.layout.display = visible

    def draw_memory(self, memory: MemoryState | None) -> None:
        """Shows the memory in use, by part."""
        self._memory.value = to_html(memory_bar(memory)) if memory is not None else ""


def _to_switch_to(model: ModelState, visible: Collection[str]) -> list[str]:
    """The adapters whose rows are visible, and those that are active."""
    return [item.name for item in model.adapters if item.name in visible or item.active]


def _line(result: Any) -> str:
    """The first line of a result, without its notes: these name commands, and a panel has buttons."""
    return str(getattr(result, "line", result))


def _notes(result: Any) -> str:
    """The notes of a result, without its first line."""
    return " ".join(getattr(result, "notes", ()))
