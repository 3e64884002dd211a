"""Preferences in a session: a run is resumed with its objective and its reference, and recorded with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbpeft.session import Session
from tests.runs.killed import session_in, when_noted
from tests.tiny_models import same_state
from tests.training.objectives.trl_run import ROWS, filled
from tests.training.support import weights
from tests.training.trl_run import tiny_base, tiny_tokenizer

FIELDS: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "max_steps": 6, "learning_rate": 1e-2, "beta": 0.3}


def begun(place: Path, *, trained: bool) -> tuple[Session, Any]:
    session = session_in(place)
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    model = session.add(tiny_base(), lora, name="sql", variable="model").model
    return session, filled(model) if trained else model


@pytest.mark.parametrize("trained", [True, False])
def test_a_stopped_run_is_resumed_on_a_new_model_to_the_bit(trained: bool, tmp_path: Path) -> None:
    session, model = begun(tmp_path / "whole", trained=trained)
    whole = session.train(model, ROWS, **FIELDS)
    session, first = begun(tmp_path / "parts", trained=trained)
    end = session.on_run(lambda run, name: when_noted(run, 3, run.control.request_stop))
    stopped = session.train(first, ROWS, **FIELDS)
    end()
    assert stopped.status == "stopped"
    result = session_in(tmp_path / "parts").resume(
        model=tiny_base(), variable="model", data=ROWS, tokenizer=FIELDS["tokenizer"]
    )
    expected = "start" if trained else "base"
    assert (result.training.objective, result.training.reference, whole.reference) == ("dpo", expected, expected)
    assert result.training.state.history == whole.state.history
    assert result.training.state.series["rewards/margins"] == whole.state.series["rewards/margins"]
    assert same_state(weights(result.model, "sql"), weights(model, "sql"))
    listed = session_in(tmp_path / "parts").runs()
    [record] = listed.records
    assert "dpo" in str(listed)
    assert {name: record.settings[name] for name in ("objective", "reference", "beta")} == {
        "objective": "dpo",
        "reference": expected,
        "beta": 0.3,
    }
