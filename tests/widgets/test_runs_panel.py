"""The table of runs: a click sorts it, and selected runs are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets
import pytest

from nbpeft.errors import CheckpointError
from nbpeft.runs.record import RunRecord
from nbpeft.runs.store import RunStore
from nbpeft.session.results.kept_runs import RunsComparison, RunsResult
from nbpeft.widgets import RunsPanel
from nbpeft.widgets.runs_panel import MOST
from tests.runs.killed import session_in
from tests.widgets.support import button, labels, parts, text

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
    return RunRecord(
        name=name, id=f"id of {name}", path=f"/runs/{name}", adapter="sql", model="model", started=started, **values
    )


def listed(records: tuple[RunRecord, ...]) -> RunsResult:
    return RunsResult("/runs", records, tuple(((1, 3.0),) for _ in records))


class Runs:
    """The runs of a session, in memory; ``running`` cannot be changed."""

    def __init__(self, records: tuple[RunRecord, ...]) -> None:
        self.records = records
        self.asked: list[tuple[str, ...]] = []

    def delete_run(self, name: str, *, run_id: str) -> str:
        return self._change(name, run_id, f"deleted {name}")

    def rename_run(self, name: str, new: str, *, run_id: str) -> str:
        return self._change(name, run_id, f"renamed {name} to {new}", name=new)

    def note_run(self, name: str, note: str, *, run_id: str) -> str:
        return self._change(name, run_id, f"noted {note}", note=note)

    def _change(self, run: str, run_id: str, told: str, **facts: str) -> str:
        assert (run, run_id) in {one.key for one in self.records}
        if run == "running":
            raise CheckpointError("run running is still running")
        self.records = tuple(
            replace(one, **facts) if one.name == run else one for one in self.records if facts or one.name != run
        )
        return told

    def runs(self, *names: str) -> RunsComparison | RunsResult:
        if not names:
            return listed(self.records)
        self.asked.append(names)
        found = tuple(next(one for one in self.records if one.name == name) for name in names)
        return RunsComparison(found, {"loss": tuple((((1, 3.0), (2, 2.0)), ()) for _ in found)})


def panel_of(records: tuple[RunRecord, ...], **options: str) -> RunsPanel:
    session: Any = Runs(records)
    return RunsPanel(session, listed(records), ui="widgets", **options)  # type: ignore[arg-type]


@pytest.fixture
def panel() -> Iterator[RunsPanel]:
    made = panel_of((record("sql-2", 2.0, loss=1.0), record("sql-1", 1.0, loss=0.5)))
    yield made
    made.close()


def shown(panel: RunsPanel) -> list[str]:
    return [part.description.removeprefix("Select ") for part in parts(panel, ipywidgets.Checkbox)]


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
    assert "two or more to compare" in page
    second.value = True
    assert list(panel.selected) == ["sql-2", "sql-1"]
    page = "".join(part.value for part in parts(panel, ipywidgets.HTML))
    assert "two or more to compare" not in page and page.count("<table") == 1 and "learning_<wbr>rate" in page
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


def select(panel: RunsPanel, *names: str) -> None:
    for box in parts(panel, ipywidgets.Checkbox):
        box.value = box.description.removeprefix("Select ") in names


def field(panel: RunsPanel, label: str) -> Any:
    (found,) = (part for part in parts(panel, ipywidgets.Text) if part.description == label)
    return found


def test_a_search_lists_the_runs_with_these_words() -> None:
    one, two, three = record("sql-1", 1.0), record("sql-2", 2.0, note="Before the schema"), record("kind-1", 3.0)
    panel = panel_of((three, two, one), search="SQL-")
    assert shown(panel) == ["sql-2", "sql-1"] and "2 of 3 runs" in text(panel)
    field(panel, "Search").value = "sql schema"
    assert shown(panel) == ["sql-2"] and "kind" not in panel._repr_mimebundle_()["text/plain"]
    button(panel, "Result").click()
    assert shown(panel) == ["sql-2"]
    field(panel, "Search").value = "learning_rate 3"
    assert shown(panel) == ["kind-1"]
    field(panel, "Search").value = "nothing"
    assert shown(panel) == [] and "0 of 3 runs" in text(panel)
    assert "no run in /runs matches 'nothing'" in panel._repr_mimebundle_()["text/plain"]
    field(panel, "Search").value = ""
    assert len(shown(panel)) == 3
    panel.close()


def test_one_selected_run_is_renamed_and_noted_on(panel: RunsPanel) -> None:
    assert "Rename" not in labels(panel)
    select(panel, "sql-1")
    assert "Rename" in labels(panel) and field(panel, "Name").value == "sql-1"
    field(panel, "Name").value = " best "
    button(panel, "Rename").click()
    assert shown(panel) == ["sql-2", "best"] and panel.selected == ("best",)
    assert [box.value for box in parts(panel, ipywidgets.Checkbox)] == [False, True]
    field(panel, "Note").value = "with the <schema>"
    button(panel, "Result").click()
    assert field(panel, "Note").value == "with the <schema>"
    button(panel, "Save note").click()
    assert "with the &lt;schema&gt;" in text(panel) and panel.selected == ("best",)
    select(panel, "sql-2")
    assert field(panel, "Note").value == "" and field(panel, "Name").value == "sql-2"


def test_selected_runs_are_deleted_after_a_confirmation() -> None:
    panel = panel_of((record("sql-3", 3.0), record("sql-2", 2.0), record("sql-1", 1.0)))
    button(panel, "learning_\u200brate").click()
    select(panel, "sql-1", "sql-2")
    ask, sure = button(panel, "Delete"), button(panel, "Delete", 1, hidden=True)
    assert "Rename" not in labels(panel) and "Keep" not in labels(panel)
    ask.click()
    assert "Keep" in labels(panel) and "Delete sql-1, sql-2 with all" in text(panel)
    button(panel, "Keep").click()
    assert "Keep" not in labels(panel) and len(shown(panel)) == 3
    ask.click()
    sure.click()
    assert shown(panel) == ["sql-3"] and panel.selected == () and "<table" not in text(panel)
    assert "learning_\u200brate" not in labels(panel)
    select(panel, "sql-3")
    ask.click()
    sure.click()
    assert shown(panel) == [] and "0 runs" in text(panel)
    panel.close()


def test_a_run_that_cannot_be_deleted_stays_selected() -> None:
    panel = panel_of((record("sql-2", 2.0), record("running", 1.5), record("sql-1", 1.0)))
    select(panel, "sql-2", "running", "sql-1")
    ask, sure = button(panel, "Delete"), button(panel, "Delete", 1, hidden=True)
    ask.click()
    sure.click()
    assert shown(panel) == ["running"] and panel.selected == ("running",)
    assert "deleted sql-2 · run running is still running · deleted sql-1" in text(panel)
    panel.close()


# With runs on disk, which others change meanwhile


def put(store: RunStore, adapter: str, run_id: str) -> str:
    """A run that has ended."""
    folder = store.create(adapter)
    folder.write({"id": run_id, "adapter": adapter, "status": "finished"})
    folder.close()
    return folder.name


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[tuple[RunStore, RunsPanel]]:
    """A panel of the runs ``sql-1`` to ``sql-3``, which are selected."""
    store, session = RunStore(tmp_path), session_in(tmp_path)
    for run_id in "abc":
        put(store, "sql", run_id)
    listed = session.runs()
    assert isinstance(listed, RunsResult)
    panel = RunsPanel(session, listed, ui="widgets")
    select(panel, "sql-1", "sql-2", "sql-3")
    yield store, panel
    panel.close()


def ids(store: RunStore) -> dict[str, str]:
    return {record.name: record.id for record in store.records()}


def test_a_run_that_has_got_the_name_of_a_selected_one_is_not_deleted(kept: tuple[RunStore, RunsPanel]) -> None:
    store, panel = kept
    store.rename("sql-3", "best")
    assert put(store, "sql", "new") == "sql-3"
    button(panel, "Delete", 1, hidden=True).click()
    assert ids(store) == {"best": "c", "sql-3": "new"}
    assert "the list is out of date: sql-3 is another run now" in text(panel) and "deleted run sql-1" in text(panel)
    assert panel.selected == () and sorted(shown(panel)) == ["best", "sql-3"]


@pytest.mark.parametrize("change", ["Rename", "Save note"])
def test_a_run_that_has_got_the_name_of_the_selected_one_is_not_changed(
    change: str, kept: tuple[RunStore, RunsPanel]
) -> None:
    store, panel = kept
    select(panel, "sql-3")
    store.delete("sql-3")
    put(store, "sql", "new")
    before = store.records()
    field(panel, "Name").value = field(panel, "Note").value = "mine"
    button(panel, change).click()
    assert store.records() == before and panel.selected == ()
    assert "the list is out of date: sql-3 is another run now" in text(panel)


def test_a_run_that_is_gone_does_not_keep_the_others_from_being_deleted(kept: tuple[RunStore, RunsPanel]) -> None:
    store, panel = kept
    store.delete("sql-1")
    button(panel, "Delete", 1, hidden=True).click()
    assert ids(store) == {} and shown(panel) == [] and panel.selected == ()
    assert "run sql-1 is gone · deleted run sql-2 · deleted run sql-3" in text(panel)


def test_runs_are_not_compared_with_one_that_is_gone_or_has_the_name_of_another(
    kept: tuple[RunStore, RunsPanel],
) -> None:
    store, panel = kept
    store.delete("sql-2")
    select(panel, "sql-1", "sql-2")
    assert list(panel.selected) == ["sql-1"] and shown(panel).count("sql-2") == 0
    assert "no run is called" in text(panel)
    select(panel, "sql-1", "sql-3")
    assert list(panel.selected) == ["sql-1", "sql-3"] and "no run is called" not in text(panel)
    store.delete("sql-3")
    store.rename("sql-1", "sql-3")
    put(store, "sql", "new")
    select(panel, "sql-1")
    assert panel.selected == ("sql-1",)
    button(panel, "Delete", 1, hidden=True).click()
    assert sorted(ids(store).values()) == ["a", "new"]
