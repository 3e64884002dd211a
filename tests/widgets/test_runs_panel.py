"""The table of runs: a click sorts it, and selected runs are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ipywidgets
import pytest

from nbpeft.runs.record import RunRecord
from nbpeft.session.results.kept_runs import RunsComparison, RunsResult
from nbpeft.widgets import RunsPanel
from nbpeft.widgets.runs_panel import MOST
from tests.widgets.support import button, parts

pytestmark = pytest.mark.usefixtures("no_widget_stays")


def record(name: str, started: float, **more: Any) -> RunRecord:
    facts: dict[str, Any] = {"base model": "org/tiny", "method": "LoRA", "rows": 200, "learning_rate": started}
    values: dict[str, Any] = {"step": 4, "total_steps": 4, "loss": 2.0, "eval_loss": None, "best_loss": None}
    values |= {
        "headline": {"loss": more.get("loss", 2.0)},
        "best_step": None,
        "seconds": 3.0,
        "settings": facts,
        "status": "finished",
        **more,
    }
    return RunRecord(name=name, path=f"/runs/{name}", adapter="sql", model="model", started=started, **values)


class Compares:
    """A session that compares runs."""

    def __init__(self, records: tuple[RunRecord, ...]) -> None:
        self.records = records
        self.asked: list[tuple[str, ...]] = []

    def runs(self, *names: str) -> RunsComparison:
        self.asked.append(names)
        found = tuple(next(one for one in self.records if one.name == name) for name in names)
        return RunsComparison(found, {"loss": tuple((((1, 3.0), (2, 2.0)), ()) for _ in found)})


def panel_of(records: tuple[RunRecord, ...]) -> RunsPanel:
    session: Any = Compares(records)
    return RunsPanel(session, RunsResult("/runs", records, tuple(((1, 3.0),) for _ in records)), ui="widgets")


@pytest.fixture
def panel() -> Iterator[RunsPanel]:
    made = panel_of((record("sql-2", 2.0, loss=1.0), record("sql-1", 1.0, loss=0.5)))
    yield made
    made.close()


def shown(panel: RunsPanel) -> list[str]:
    return [part.description.removeprefix("Compare ") for part in parts(panel, ipywidgets.Checkbox)]


def test_a_click_on_a_column_sorts(panel: RunsPanel) -> None:
    assert shown(panel) == ["sql-2", "sql-1"]
    button(panel, "Result").click()
    assert shown(panel) == ["sql-1", "sql-2"] and "nbpeft-on" in button(panel, "Result")._dom_classes
    button(panel, "learning_\u200brate").click()
    assert shown(panel) == ["sql-1", "sql-2"]
    assert [">1<" in part.value for part in parts(panel, ipywidgets.HTML) if "nbpeft-grid" in part.value] == [
        True,
        False,
    ]
    button(panel, "Steps").click()
    assert "nbpeft-on" not in button(panel, "Result")._dom_classes
    assert len(panel.result.curves) == 2


def test_two_that_are_selected_are_compared(panel: RunsPanel) -> None:
    first, second = parts(panel, ipywidgets.Checkbox)
    first.value = True
    assert list(panel.selected) == ["sql-2"] and "<table" not in parts(panel, ipywidgets.HTML)[-2].value
    page = "".join(part.value for part in parts(panel, ipywidgets.HTML))
    assert "Select two or more" in page
    second.value = True
    assert list(panel.selected) == ["sql-2", "sql-1"]
    page = "".join(part.value for part in parts(panel, ipywidgets.HTML))
    assert "Select two or more" not in page and page.count("<table") == 1 and "learning_<wbr>rate" in page
    saved = panel._repr_mimebundle_()
    assert saved["text/html"].count("<table") == 2 and "sql-2 · sql-1" in saved["text/plain"]
    button(panel, "Result").click()
    assert [box.value for box in parts(panel, ipywidgets.Checkbox)] == [True, True]
    first.value = False
    assert "<table" not in "".join(part.value for part in parts(panel, ipywidgets.HTML))


def test_of_many_runs_the_newest_are_shown_at_first() -> None:
    panel = panel_of(tuple(record(f"sql-{number}", 100.0 - number) for number in range(MOST + 3)))
    assert len(shown(panel)) == MOST
    button(panel, "Show all").click()
    assert len(shown(panel)) == MOST + 3
    panel.close()


def test_the_metrics_of_a_run_have_a_line_each_without_their_prefix() -> None:
    metrics = {"eval_rewards/accuracies": 1.0, "eval_rewards/margins": 0.42, "eval_kl": 0.1}
    (row,) = RunsResult("/runs", (record("kind", 1.0, metrics=metrics, best_loss=0.5),), ()).rows()
    best = row[2]
    assert isinstance(best, tuple)
    assert [getattr(span, "text", span) for span in best][1:] == [
        "rewards/accuracies 1.000",
        "rewards/margins 0.420",
        "and 1 more",
    ]
    assert {span.wrap for span in best} == {"words"}
