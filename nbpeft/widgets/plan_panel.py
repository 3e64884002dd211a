"""The memory plan with sliders: what a run would need, part by part, while the settings move.

slider ──> planner.at_once(settings) ──> the card, in milliseconds
       └─> not prepared yet: a worker thread prepares these settings, then the likely next ones
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from nbpeft.errors import NbpeftError
from nbpeft.session import render
from nbpeft.session.planned import PlanResult, PlanSettings
from nbpeft.widgets import styles
from nbpeft.widgets.environment import WIDGET_VIEW, Ui, shown_as
from nbpeft.widgets.lifetime import close_tree, view_of
from nbpeft.widgets.worker import Stopped, Worker

if TYPE_CHECKING:
    from nbpeft.session.planning import MemoryPlanner
    from nbpeft.widgets.plan_parts import PlanParts

AGAIN = "Run the cell again for sliders."


class PlanPanel:
    """Sliders and choices, and what a run with them would need.

    It shows itself as the last value of a cell. There is one panel for a model: showing a new one
    closes the one before. Without a kernel or without ipywidgets it is a card, or a line of text.

    Args:
        planner: Answers.
        ui: How to show it; by default the richest that works here.
        prefetch: Whether to prepare the settings that are likely to come next.
    """

    def __init__(self, planner: MemoryPlanner, *, ui: Ui = "auto", prefetch: bool = True) -> None:
        self._planner = planner
        self._ui: Ui = ui
        self._prefetch = prefetch
        self._lock = threading.RLock()
        self._worker = Worker()
        self._parts: PlanParts | None = None
        self._closed = False
        self._result = planner.exact(suggest=False)

    @property
    def result(self) -> PlanResult:
        """The last plan."""
        return self._result

    @property
    def closed(self) -> bool:
        """Whether it was closed since it was shown last."""
        return self._closed

    @property
    def widget(self) -> Any:
        """The root widget, to be placed among other widgets; made on first use.

        Raises:
            ModuleNotFoundError: ipywidgets is not installed.
        """
        with self._lock:
            if self._parts is None:
                self._open()
            assert self._parts is not None
            return self._parts.root

    def close(self) -> None:
        """Frees the widgets. May be called twice."""
        self._worker.stop()
        with self._lock:
            self._closed = True
            parts, self._parts = self._parts, None
            if _open.get(self._planner.name) is self:
                del _open[self._planner.name]
        if parts is not None:
            close_tree(parts.root)
            parts.free()

    def wait(self, timeout: float = 60.0) -> bool:
        """Waits until nothing is being prepared; says whether that came about."""
        return self._worker.wait(timeout)

    def __repr__(self) -> str:
        return str(self._result)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        shown = "html" if self._closed else shown_as(self._ui)
        bundle: dict[str, Any] = {"text/plain": str(self._result)}
        if shown != "text":
            bundle["text/html"] = self._card(AGAIN if shown == "widgets" else "")
        if shown == "widgets":
            bundle["text/plain"] += f"\n{AGAIN}"
            bundle[WIDGET_VIEW] = view_of(self.widget)
        return bundle

    def _card(self, hint: str) -> str:
        result = self._result
        aside = " · ".join(text for text in (result.class_name, result.adapter) if text)
        told = "".join(render.line(render.dim(note)) for note in (*result.notes, hint) if note)
        return render.card(self._title, result.body(), told, aside=aside)

    @property
    def _title(self) -> str:
        return f"memory plan · {self._planner.name}"

    def _open(self) -> None:
        from nbpeft.widgets.plan_parts import PlanParts

        before = _open.get(self._planner.name)
        if before is not None and before is not self:
            before.close()
        self._closed = False
        self._parts = PlanParts(self._command, self._title, self._result.settings)
        _open[self._planner.name] = self
        self._parts.show(self._result, current=True)
        self._prepare(self._result.settings)

    def _command(self, *command: Any) -> None:
        """What widgets call; handlers may run in another thread."""
        with self._lock:
            if self._parts is not None:
                self._guarded(self._moved)

    def _moved(self) -> None:
        parts = self._parts
        if parts is None:
            return
        settings = parts.settings
        found = self._planner.at_once(settings)
        if found is None:
            parts.show(self._result, current=False)
            self._prepare(settings)
        else:
            self._draw(found)

    def _draw(self, found: PlanResult) -> None:
        self._result = found
        if self._parts is not None:
            self._parts.show(found, current=True)
            self._parts.tell("", styles.DIM)

    def _prepare(self, settings: PlanSettings) -> None:
        self._worker.submit(lambda stopped: self._guarded(lambda: self._prepared(settings, stopped)))

    def _prepared(self, settings: PlanSettings, stopped: Stopped) -> None:
        """The worker's part."""
        quick = self._planner.prepare(settings)
        found = self._planner.at_once(settings) if quick else self._planner.exact(settings, suggest=False)
        with self._lock:
            # What was moved meanwhile has its own job, or was answered.
            if self._parts is not None and self._parts.settings == settings and found is not None:
                self._draw(found)
            elif self._parts is not None and not self._worker.waiting:
                self._moved()
        for other in self._planner.neighbours(settings) if quick and self._prefetch else ():
            if stopped() or self._closed:
                return
            self._planner.prepare(other)
            with self._lock:
                # Prepared settings turn into suggestions.
                if self._parts is not None and not stopped():
                    self._moved_if_settled()

    def _moved_if_settled(self) -> None:
        parts = self._parts
        if parts is not None and parts.settings == self._result.settings:
            found = self._planner.at_once(parts.settings)
            if found is not None and found != self._result:
                self._draw(found)

    def _guarded(self, act: Any) -> None:
        """Does something; what goes wrong is shown in the panel, where it would be lost in a log."""
        try:
            act()
            return
        except NbpeftError as error:
            words = str(error)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
        with self._lock:
            if self._parts is not None:
                self._parts.show(self._result, current=True)
                self._parts.tell(words, styles.ERROR)


_open: dict[str, PlanPanel] = {}
"""The panels that are shown, by model; handlers hold them weakly, so they are held here."""


def close_plan_panels() -> None:
    """Closes all of them."""
    for panel in list(_open.values()):
        panel.close()
