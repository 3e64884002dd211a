"""The curves by which an objective says that a training is judged are shown first, wherever a run is shown."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbpeft.display.html import to_html
from nbpeft.display.training import training_card, training_text
from nbpeft.session import Session
from nbpeft.session.results.kept_runs import RunsComparison
from nbpeft.training.objectives.objective import names, objective_named
from tests.session.test_preferences import FIELDS, begun
from tests.session.test_rewards import FIELDS as OF_REWARDS
from tests.session.test_rewards import PROMPTS, of_words
from tests.training.objectives.trl_run import ROWS

JUDGED = {
    **dict.fromkeys(("sft", "classify"), ("loss",)),
    **dict.fromkeys(("dpo", "orpo", "simpo", "cpo", "reward"), ("rewards/margins", "rewards/accuracies", "loss")),
    "kto": ("rewards/margins", "kl", "loss"),
    "grpo": ("reward",),
}


def trained(place: Path, name: str) -> tuple[Session, Any]:
    session, model = begun(place, trained=True)
    if name == "dpo":
        return session, session.train(model, ROWS, **FIELDS)
    return session, session.train(model, PROMPTS, reward=of_words, **OF_REWARDS)


def lowered(lower: int, completions: list[str]) -> list[float]:
    return [len({*text}) / 100 - 10 * lower for text in completions]


def test_each_objective_names_the_curves_by_which_it_is_judged() -> None:
    assert {name: objective_named(name).headline() for name in JUDGED} == JUDGED and {*names()} == {*JUDGED}


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_every_display_of_a_run_begins_with_them(objective: str, tmp_path: Path) -> None:
    session, result = trained(tmp_path, objective)
    state = result.state
    assert tuple(state.figures) == JUDGED[objective]
    words = {name: f"{name} {state.figures[name]:.3f}" for name in JUDGED[objective] if name != "loss"}
    listed, compared = session.runs(), session.runs("sql-1", "sql-1")
    assert isinstance(compared, RunsComparison)
    (record,) = listed.records
    assert listed.curves == (state.series[next(iter(words))],) and dict(record.headline) == pytest.approx(state.figures)
    kept = session.find_run("sql-1")
    for text in (str(result), training_text(state), str(listed), str(kept)):
        assert all(word in text for word in words.values())
        assert (" loss " in text) == ("loss" in state.headline)
    for name in words:
        assert f"{state.figures[name]:.3f}" in str(compared).partition(name)[2].partition("\n")[0]
        assert compared.curves[name][0] == (state.series[name], ())
        assert f">{name}<" in to_html(training_card(state))


def test_of_a_run_that_was_killed_the_last_logged_figures_are_listed(tmp_path: Path) -> None:
    session, result = trained(tmp_path, "grpo")
    file = tmp_path / "sql-1" / "run.json"
    facts = json.loads(file.read_text()) | {"status": "running", "process": 2**31 - 1, "headline": {"reward": None}}
    file.write_text(json.dumps(facts))
    (record,) = session.runs().records
    assert record.status == "crashed" and record.headline == pytest.approx(result.state.figures)


def test_runs_are_sorted_by_the_first_of_them_the_best_first(tmp_path: Path) -> None:
    session, model = begun(tmp_path, trained=True)
    for lower in (1, 0, 2):
        session.train(model, PROMPTS, reward=partial(lowered, lower), **OF_REWARDS)
    rewards = [record.headline["reward"] or 0.0 for record in session.runs(sort="result").records]
    assert [round(reward) for reward in rewards] == [0, -10, -20]
