"""Panels and live views of a notebook: they draw session states and send session commands.

    show_run(run, session, model_name)     a training run, live, with Stop and Pause
    show_runs(session)                     every training that the session starts
    AdaptersPanel(session, model_name)     the adapters of a model, to switch, save and delete
    ComparePanel(session, model_name)      a prompt, and the answers of base model and adapters, side by side
    BlendPanel(session, model_name)        a slider for each adapter, and the answer of the blend
    LiveAnswers()                          answers while a cell runs
    PlanPanel(planner)                     sliders, and what a run with them would need
    RunsPanel(session, runs)               the saved runs, to sort and compare
    ScorePanel(result)                     scores, and their items page by page
    close_all()                            closes what is shown, e.g. when the extension is unloaded

Importing this imports neither torch nor ipywidgets.
"""

from __future__ import annotations

from nbpeft.widgets.adapters_panel import AdaptersPanel
from nbpeft.widgets.blend_panel import BlendPanel
from nbpeft.widgets.compare_panel import ComparePanel
from nbpeft.widgets.environment import resender
from nbpeft.widgets.live_answers import LiveAnswers
from nbpeft.widgets.panel import close_panels
from nbpeft.widgets.plan_panel import PlanPanel
from nbpeft.widgets.runs_panel import RunsPanel
from nbpeft.widgets.score_panel import ScorePanel
from nbpeft.widgets.training_panel import RunView, close_views, show_run, show_runs

__all__ = [
    "AdaptersPanel",
    "BlendPanel",
    "ComparePanel",
    "LiveAnswers",
    "PlanPanel",
    "RunView",
    "RunsPanel",
    "ScorePanel",
    "close_all",
    "show_run",
    "show_runs",
]


def close_all() -> None:
    """Closes every panel and live view of this process; training runs continue."""
    resender.close()
    close_views()
    close_panels()
