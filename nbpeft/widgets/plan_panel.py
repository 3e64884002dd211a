"""The memory plan with sliders: what a run would need, part by part, while the settings move.

A move is answered by a worker thread, in less than half a second: first the parts, then what could be changed.
A newer move stops what is still being computed for an older one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import Block, card, dim, line
from nbpeft.session.results.planning import PlanResult, PlanSettings
from nbpeft.widgets.environment import Ui
from nbpeft.widgets.panel import Panel
from nbpeft.widgets.worker import Stopped, Worker

if TYPE_CHECKING:
    from nbpeft.session.commands.planning import MemoryPlanner


_DEBOUNCE = 0.15
"""Seconds without a further move after which a move is computed."""


class PlanPanel(Panel):
    """Sliders and choices, and what a run with them would need.

    Args:
        planner: Answers.
        ui: How to show it; by default the richest that works here.
    """

    kind: ClassVar[str] = "plan"

    def __init__(self, planner: MemoryPlanner, *, ui: Ui = "auto") -> None:
        super().__init__(ui)
        self._planner = planner
        self._worker = Worker()
        self._result = planner.plan(suggest=False)

    @property
    def result(self) -> PlanResult:
        """The last plan."""
        return self._result

    def close(self, leaving: str = "") -> None:
        """Stops computing and frees the widgets. May be called twice."""
        self._worker.stop()
        super().close(leaving)

    def wait(self, timeout: float = 60.0) -> bool:
        """Waits until nothing is being computed; returns whether that came about."""
        return self._worker.wait(timeout)

    @property
    def _key(self) -> str:
        return self._planner.name

    def _build(self) -> Any:
        from nbpeft.widgets.plan_controls import PlanControls

        return PlanControls(self._command, self._title, self._result.settings, self._result.room.name)

    def _opened(self) -> None:
        self._parts.show(self._result, current=True)
        self._compute(self._result.settings)

    def _release(self, parts: Any) -> None:
        parts.free()

    def _failed(self) -> None:
        self._parts.show(self._result, current=True)

    def _text(self) -> str:
        return str(self._result)

    def _card(self, hint: str) -> Block:
        view = self._result.view()
        return card(view.title, *view.blocks, line(dim(hint)), aside=view.aside)

    @property
    def _title(self) -> str:
        return f"Memory plan for {self._planner.name}"

    def _command(self, *command: Any) -> None:
        """What widgets call; handlers may run in another thread."""
        with self._lock:
            if self._parts is not None:
                self._guarded(self._moved)

    def _moved(self) -> str:
        """Has the settings that the sliders show computed."""
        if self._parts is not None:
            self._parts.show(self._result, current=False)
            self._compute(self._parts.settings, delay=_DEBOUNCE)
        return ""

    def _compute(self, settings: PlanSettings, delay: float = 0.0) -> None:
        self._worker.submit(lambda stopped: self._guarded(lambda: self._computed(settings, stopped)), delay)

    def _computed(self, settings: PlanSettings, stopped: Stopped) -> str:
        """The worker's part."""
        self._draw(self._planner.plan(settings, suggest=False), stopped)
        self._draw(self._planner.plan(settings, stopped=stopped), stopped)
        return ""

    def _draw(self, found: PlanResult, stopped: Stopped) -> None:
        """Shows a plan, unless other settings were asked for meanwhile."""
        with self._lock:
            if self._parts is not None and not stopped():
                self._result = found
                self._parts.show(found, current=True)
                self._changed()
                self._say("", "dim")
