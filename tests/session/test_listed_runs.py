"""Runs of a session: listed, compared, renamed, and what is said of their results."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nbpeft
from nbpeft.display.next_steps import next_steps
from nbpeft.errors import AdapterError, CheckpointError, CheckpointNotFoundError, ConfigError
from nbpeft.session.results.kept_runs import RunCard, RunsComparison
from tests.runs.killed import ARGUMENTS, adapted_session, rows, session_in, when_noted
from tests.training.support import token_rows


def test_listing_sorting_and_comparing(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    assert str(session.runs()) == f"there is no run in {tmp_path} yet"
    for rate, steps in ((0.001, 4), (0.01, 2), (0.02, 3)):
        session.train(
            model, rows(), token_rows(4), restart=True, **ARGUMENTS | {"learning_rate": rate, "max_steps": steps}
        )
    names = [record.name for record in session.runs().records]
    assert names == ["sql-3", "sql-2", "sql-1"]
    assert [record.name for record in session.runs(sort="result").records] == [
        name for _, name in sorted((record.loss, record.name) for record in session.runs().records)
    ]
    assert [record.step for record in session.runs(sort="steps").records] == [4, 3, 2]
    with pytest.raises(ConfigError, match=r"cannot be sorted by 'resul'. Did you mean 'result'"):
        session.runs(sort="resul")
    compared = session.runs("sql-1", "sql-3")
    assert isinstance(compared, RunsComparison)
    assert compared.differing == {"learning_rate": (0.001, 0.02), "max_steps": (4, 3)}
    assert [(len(learned), len(measured) > 0) for learned, measured in compared.curves["loss"]] == [
        (4, True),
        (3, True),
    ]
    page = compared._repr_html_()
    assert page.count("<img") == 1 and "sql-1" in page and "learning_<wbr>rate" in page and "lora_" not in page
    listed = session.runs()
    table = listed._repr_html_()
    assert table.count("<img") == 3 and len(listed.curves) == 3 and all(listed.curves)
    head = ["Run", "Result", "Best evaluation", "Curve", "learning_rate", "max_steps", "Steps", "Status"]
    assert [title.replace("<wbr>", "") for title in re.findall(r"<th [^>]*>(.*?)</th>", table)] == head
    assert "all: LlamaForCausalLM, LoRA, 24 rows" in str(listed) and "max-width:none" in table
    for sort in ("learning_rate", "max_steps"):
        values = [record.settings[sort] for record in session.runs(sort=sort).records]
        assert values == sorted(values) and len(values) == 3
    assert "peft_type" not in table + page
    assert "<table" in table and "<script" not in table and ">0.02<" in table


def test_the_step_of_the_best_loss_is_not_that_of_the_best_metric(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    session.train(model, rows(), token_rows(4), **ARGUMENTS | {"max_steps": 2})
    listed = session.runs()
    (record,) = listed.records
    assert f"at step {record.best_step}" in str(listed)
    by_metric = {**record.settings, "metric_for_best_model": "exact"}
    for changes in ({"settings": by_metric}, {"best_loss": None}):
        assert "at step" not in str(replace(listed, records=(replace(record, **changes),)))


@pytest.mark.parametrize("how", ["patience", "load_best_model_at_end"])
def test_what_continues_from_the_best_weights_says_so(how: str, tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    given: dict[str, Any] = {"max_steps": 4, "learning_rate": 5.0, "stop_on_divergence": False, "eval_steps": 1}
    given |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "out")}
    given |= {"patience": 1} if how == "patience" else {how: True}
    best = session.train(model, rows(), token_rows(4), **ARGUMENTS | given).state
    assert best.restored_step == best.best_step == 1 < best.step
    second = session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    assert "continues from the weights after step 1 of run sql-1" in str(second)


def test_what_continues_from_the_best_weights_of_a_sweep_says_so(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    given = ARGUMENTS | {"learning_rate": nbpeft.sweep(5.0, 4.0), "max_steps": 4, "stop_on_divergence": False}
    given |= {"eval_strategy": "steps", "eval_steps": 1, "patience": 1}
    members = session.train(model, rows(), token_rows(4), **given).state.members
    assert [member.restored_step for member in members] == [1, 1] and all(member.step > 1 for member in members)
    second = session.train(model, rows(), adapter=members[0].name, **ARGUMENTS | {"max_steps": 1})
    assert "continues from the weights after step 1 of run sql-sweep-1" in str(second)


def test_scores_are_those_of_the_best_step(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    session.train(model, rows(), token_rows(4), **ARGUMENTS | {"max_steps": 4})
    (folder,) = tmp_path.glob("sql-1")
    facts = json.loads((folder / "run.json").read_text())
    facts["settings"]["metric_for_best_model"] = "exact"
    (folder / "run.json").write_text(json.dumps(facts | {"metrics": {"exact": 0.2, "other": 0.4}, "best_step": 2}))
    with (folder / "curve.jsonl").open("a") as log:
        log.writelines(json.dumps({"step": step, "eval_exact": value}) + "\n" for step, value in ((2, 0.9), (4, 0.2)))
    listed = session.runs()
    assert listed.records[0].metrics == {"exact": 0.9, "other": 0.4}
    assert "exact 0.900 other 0.400 at step 2" in str(listed)
    compared = str(session.runs("sql-1", "sql-1"))
    assert re.search(r"exact at best step +0\.9", compared) and re.search(r"best step +2", compared)


@pytest.mark.parametrize("change", ["swap", "reset", "load"])
def test_weights_that_replace_those_of_a_training_are_not_told_as_its_own(change: str, tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    session.save(tmp_path / "saved", adapter="sql")
    train = session.train(model, rows(), **ARGUMENTS | {"max_steps": 1}).state

    def told() -> bool | None:
        steps = next_steps(train, session.state, "model")
        assert steps is not None
        return steps.saved

    assert told() is False
    if change == "swap":
        session.swap(tmp_path / "saved", into="sql", replace=True)
    elif change == "reset":
        session.reset("sql")
    else:
        session.load(tmp_path / "saved", name="sql", replace=True)
    assert told() is None
    session.undo()
    assert told() is False


def test_losses_of_different_objectives_are_said_to_be_different(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    for _ in range(2):
        session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    compared = session.runs("sql-1", "sql-2")
    first, second = compared.records
    words = "different objectives: their losses cannot be compared"
    assert words not in str(compared) and words not in compared._repr_html_()
    other = replace(compared, records=(first, replace(second, settings={**second.settings, "objective": "dpo"})))
    assert words in str(other) and words in other._repr_html_()


def test_the_table_as_a_dataframe(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 2})
    frame = session.runs().to_dataframe()
    assert list(frame["name"]) == ["sql-1"] and list(frame["step"]) == [2] and list(frame["r"]) == [4]
    assert {"status", "loss", "eval_loss", "best_loss", "seconds", "learning_rate", "lora_dropout"} <= set(frame)


def test_renaming_and_deleting(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    assert str(session.rename_run("sql-1", "best")) == "renamed run sql-1 to best"
    with pytest.raises(CheckpointNotFoundError, match=r"no run is called 'bes'.*Did you mean 'best'"):
        session.delete_run("bes")
    assert str(session.note_run("best", "the small rank")) == "the note on run best is saved"
    listed = session.runs(search="RANK r 4")
    assert "the small rank" in str(listed) and "the small rank" in str(session.runs("best"))
    assert list(listed.to_dataframe()["note"]) == ["the small rank"]
    assert str(session.runs(search="large")) == f"no run in {listed.place} matches 'large'"
    for name, given in (("sort", "time"), ("search", "rank")):
        with pytest.raises(ConfigError, match=f"{name} is for the list of all runs, and 'best' would be compared"):
            session.runs("best", **{name: given})
    token = "hf_" + "aB3d" * 8
    assert str(session.note_run("best", token)) == "the note on run best is saved without its access token or password"
    assert str(session.note_run("best", "")) == "run best has no note"
    assert str(session.delete_run("best")) == "deleted run best"
    assert session.runs().records == ()


def test_a_run_is_known_by_its_id_after_another_has_its_name(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path / "runs")
    first = session.train(model, rows(), **ARGUMENTS | {"max_steps": 2}).state
    session.rename_run("sql-1", "best")
    other, other_model = adapted_session(tmp_path / "runs")
    other.on_run(lambda run, name: when_noted(run, 1, run.control.request_stop))
    other.train(other_model, rows(), **ARGUMENTS | {"max_steps": 3})  # is called sql-1 now
    session.save(tmp_path / "saved")
    saved = {record.name: record.saved for record in session.runs().records}
    assert saved == {"sql-1": {}, "best": {"sql": str(tmp_path / "saved")}}
    for name, steps in (("best", 2), ("sql-1", 1)):
        card = session.find_run(name)
        assert isinstance(card, RunCard) and card.train.step == steps
        assert card.train.folder == str(tmp_path / "runs" / name)
    with pytest.raises(AdapterError, match=r"'sql' was trained by run best since, and resuming run sql-1 would undo"):
        session.resume("sql-1", model=model, data=rows())
    second = session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    assert "continues from the weights after step 2 of run best" in str(second)
    assert first.kept_id and first.kept_id != second.state.kept_id


def test_a_run_that_is_deleted_is_not_taken_for_the_next_of_its_name(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path / "runs")
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 1})
    session.delete_run("sql-1")
    card = session.find_run()
    assert isinstance(card, RunCard) and card.train.folder == ""
    other, other_model = adapted_session(tmp_path / "runs")
    other.train(other_model, rows(), **ARGUMENTS | {"max_steps": 1})
    session.save(tmp_path / "saved")
    assert [(record.name, record.saved) for record in session.runs().records] == [("sql-1", {})]
    again = str(session.train(model, rows(), **ARGUMENTS | {"max_steps": 1}))
    assert "continues from the weights after step 1 of a run that is no longer in the runs folder" in again


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path)
    end = session.on_run(lambda run, name: when_noted(run, 2, run.control.request_stop))
    session.train(model, rows(), **ARGUMENTS | {"max_steps": 3})
    end()
    (before,) = session.runs().records
    session.resume(model="model", data=rows())
    (after,) = session.runs().records
    assert before.id == after.id != "" and (before.status, after.status) == ("stopped", "finished")
    session.save(tmp_path / "saved")
    assert session.runs().records[0].saved == {"sql": str(tmp_path / "saved")}


def denied(path: object) -> list[str]:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("why", ["Not a directory", "Permission denied"])
def test_a_runs_folder_that_cannot_be_read_is_not_told_as_empty(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_in(tmp_path / "runs")
    if why == "Not a directory":
        (tmp_path / "runs").write_text("a file")
    else:
        monkeypatch.setattr(os, "listdir", denied)
    told = f"^the runs folder {re.escape(str(tmp_path / 'runs'))} cannot be read: {why}$"
    for act in (session.runs, session.find_run, session.kept_run, session.resume, lambda: session.delete_run("sql-1")):
        with pytest.raises(CheckpointError, match=told):
            act()
    assert session.run_names() == ()
