"""The memory plan with sliders: what a run would need, part by part, while the settings move.

slider ──> planner.at_once(settings) ──> the card, in milliseconds
       └─> not prepared yet: a worker thread prepares these settings, then the likely next ones
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import card, dim, line
from nbpeft.display.html import to_html
from nbpeft.session.results.planning import PlanResult, PlanSettings
from nbpeft.widgets.environment import Ui
from nbpeft.widgets.panel import Panel
from nbpeft.widgets.worker import Stopped, Worker

if TYPE_CHECKING:
    from nbpeft.session.commands.planning import MemoryPlanner


class PlanPanel(Panel):
    """Sliders and choices, and what a run with them would need.

    Args:
        planner: Answers.
        ui: How to show it; by default the richest that works here.
        prefetch: Whether to prepare the settings that are likely to come next.
    """

    kind: ClassVar[str] = "plan"

    def __init__(self, planner: MemoryPlanner, *, ui: Ui = "auto", prefetch: bool = True) -> None:
        super().__init__(ui)
        self._planner = planner
        self._prefetch = prefetch
        self._worker = Worker()
        self._result = planner.exact(suggest=False)

    @property
    def result(self) -> PlanResult:
        """The last plan."""
        return self._result

    def close(self, leaving: str = "") -> None:
        """Stops preparing and frees the widgets. May be called twice."""
        self._worker.stop()
        super().close(leaving)

    def wait(self, timeout: float = 60.0) -> bool:
        """Waits until nothing is being prepared; says whether that came about."""
        return self._worker.wait(timeout)

    @property
    def _key(self) -> str:
        return self._planner.name

    def _build(self) -> Any:
        from nbpeft.widgets.plan_controls import PlanControls

        return PlanControls(self._command, self._title, self._result.settings)

    def _opened(self) -> None:
        self._parts.show(self._result, current=True)
        self._prepare(self._result.settings)

    def _release(self, parts: Any) -> None:
        parts.free()

    def _failed(self) -> None:
        self._parts.show(self._result, current=True)

    def _text(self) -> str:
        return str(self._result)

    def _card(self, hint: str) -> str:
        view = self._result.view()
        return to_html(card(view.title, *view.blocks, line(dim(hint)), aside=view.aside))

    @property
    def _title(self) -> str:
        return f"memory plan · {self._planner.name}"

    def _command(self, *command: Any) -> None:
        """What widgets call; handlers may run in another thread."""
        with self._lock:
            if self._parts is not None:
                self._guarded(self._moved)

    def _moved(self) -> str:
        """Answers the settings that the sliders show, now or as soon as they are prepared."""
        parts = self._parts
        if parts is None:
            return ""
        settings = parts.settings
        found = self._planner.at_once(settings)
        if found is None:
            parts.show(self._result, current=False)
            self._prepare(settings)
        else:
            self._draw(found)
        return ""

    def _draw(self, found: PlanResult) -> None:
        self._result = found
        if self._parts is not None:
            self._parts.show(found, current=True)
            self._say("", "dim")

    def _prepare(self, settings: PlanSettings) -> None:
        self._worker.submit(lambda stopped: self._guarded(lambda: self._prepared(settings, stopped)))

    def _prepared(self, settings: PlanSettings, stopped: Stopped) -> str:
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
                return ""
            self._planner.prepare(other)
            with self._lock:
                # Prepared settings turn into suggestions.
                if self._parts is not None and not stopped():
                    self._moved_if_settled()
        return ""

    def _moved_if_settled(self) -> None:
        parts = self._parts
        if parts is not None and parts.settings == self._result.settings:
            found = self._planner.at_once(parts.settings)
            if found is not None and found != self._result:
                self._draw(found)
