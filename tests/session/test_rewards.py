"""Rewards in a session: a run is resumed with the same completions, and needs its functions again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbpeft.errors import CheckpointNotFoundError, TrainingError
from tests.runs.killed import session_in
from tests.session.test_preferences import begun
from tests.tiny_models import same_state
from tests.training.objectives.trl_run import ROWS
from tests.training.support import weights
from tests.training.trl_run import tiny_base, tiny_tokenizer

PROMPTS = [{"prompt": row["prompt"]} for row in ROWS]
FIELDS: dict[str, Any] = {
    **{"tokenizer": tiny_tokenizer(), "max_steps": 6, "learning_rate": 1e-2, "num_iterations": 2},
    **{"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 5},
}


def of_words(completions: list[str], prompts: list[str]) -> list[float]:
    return [float(len({*text.split()})) - len(text) / 10 for text in completions]


def test_a_stopped_run_is_resumed_on_a_new_model_to_the_bit(tmp_path: Path) -> None:
    session, model = begun(tmp_path / "whole", trained=True)
    whole = session.train(model, PROMPTS, reward=of_words, **FIELDS)
    session, first = begun(tmp_path / "parts", trained=True)
    runs: list[Any] = []
    end = session.on_run(lambda run, name: runs.append(run))

    def stopping(completions: list[str], prompts: list[str], trainer_state: Any) -> list[float]:
        if trainer_state.global_step == 2:
            runs[0].control.request_stop()
        return of_words(completions, prompts)

    stopped = session.train(first, PROMPTS, reward=stopping, **FIELDS)
    end()
    assert stopped.status == "stopped" and stopped.steps == 3  # between two steps that learn the same completions
    given = {"model": tiny_base(), "variable": "model", "data": PROMPTS, "tokenizer": FIELDS["tokenizer"]}
    with pytest.raises(TrainingError, match="again: reward=…"):
        session_in(tmp_path / "parts").resume(**given)
    result = session_in(tmp_path / "parts").resume(**{**given, "model": tiny_base()}, reward=of_words)
    assert result.training is not None and result.training.objective == "grpo"
    assert result.training.state.history == whole.state.history
    assert result.training.state.series["reward"] == whole.state.series["reward"]
    assert result.training.state.samples == whole.state.samples
    assert same_state(weights(result.model, "sql"), weights(model, "sql"))


def test_what_failed_before_its_first_step_is_not_taken_for_an_earlier_run(tmp_path: Path) -> None:
    session, model = begun(tmp_path, trained=True)
    session.train(model, PROMPTS, reward=of_words, **(FIELDS | {"max_steps": 1}))
    session.rename("sql", "first")
    session.add(model, {"r": 4, "target_modules": ["q_proj"]}, name="second")

    def wrong(completions: list[str]) -> list[float]:
        raise KeyError("weight")

    with pytest.raises(TrainingError, match="reward 'wrong' failed"):
        session.train(model, PROMPTS, reward=wrong, adapter="second", **FIELDS)
    message = r"second failed before its first step.* The newest run is of 'sql': session\.resume\('sql-1'\)"
    with pytest.raises(CheckpointNotFoundError, match=message):
        session.resume()
    assert model.manager.names == ("first", "second")
    assert session.resume("sql-1").run == "sql-1"
    assert "sql" in model.manager.names
