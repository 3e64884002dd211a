"""The memory plan with sliders: the memory a run would need, part by part, updated as the settings change.

A worker thread answers a change in less than half a second: first the parts, then what to change if it does not fit.
A newer change stops the computation for an older one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import Block, card, dim, line
from nbpeft.session.results.planning import PlanResult, PlanSettings
from nbpeft.widgets.environment import Ui
from nbpeft.widgets.panel import WorkerPanel
from nbpeft.widgets.worker import Stopped

if TYPE_CHECKING:
    from nbpeft.session.commands.planning import MemoryPlanner


_DEBOUNCE = 0.15
"""Seconds without a further change after which the plan is computed."""


class PlanPanel(WorkerPanel):
    """Sliders and drop-downs for the settings, and the memory a run with them would need.

    Attributes:
        result: The latest plan.
    """

    kind: ClassVar[str] = "plan"
    session_method: ClassVar[str] = "plan"

    def __init__(self, planner: MemoryPlanner, *, ui: Ui = "auto") -> None:
        super().__init__(ui)
        self._planner = planner
        self.result = planner.plan(suggest=False)

    @property
    def _key(self) -> str:
        return self._planner.name

    def _build(self) -> Any:
        from nbpeft.widgets.plan_controls import PlanControls

        return PlanControls(self._command, self._title, self.result.settings, self.result.room.name)

    def _opened(self) -> None:
        self._parts.show(self.result, current=True)
        self._compute(self.result.settings)

    def _release(self, parts: Any) -> None:
        parts.free()

    def _failed(self) -> None:
        self._parts.show(self.result, current=True)

    def _text(self) -> str:
        return str(self.result)

    def _card(self, hint: str) -> Block:
        view = self.result.view()
        return card(view.title, *view.blocks, line(dim(hint)), aside=view.aside)

    @property
    def _title(self) -> str:
        return f"Memory plan for {self._planner.name}"

    def _run(self, *command: Any) -> str:
        """Starts computing the plan for the settings shown."""
        self._parts.show(self.result, current=False)
        self._compute(self._parts.settings, delay=_DEBOUNCE)
        return ""

    def _compute(self, settings: PlanSettings, delay: float = 0.0) -> None:
        self._worker.submit(lambda stopped: self._guarded(lambda: self._computed(settings, stopped)), delay)

    def _computed(self, settings: PlanSettings, stopped: Stopped) -> str:
        """Runs in the worker thread: the plan first, then the plan with suggestions, which takes longer."""
        self._draw(self._planner.plan(settings, suggest=False), stopped)
        self._draw(self._planner.plan(settings, stopped=stopped), stopped)
        return ""

    def _draw(self, plan: PlanResult, stopped: Stopped) -> None:
        """Shows a plan, unless the settings have changed meanwhile."""
        with self._lock:
            if self._parts is not None and not stopped():
                self.result = plan
                self._parts.show(plan, current=True)
                self._changed()
                self._say("", "dim")
