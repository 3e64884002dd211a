"""A run that was stopped or killed before an evaluation goes on with it, with the same bits as the unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from nbpeft import sweep
from tests.faults.killing import die
from tests.runs.killed import ARGUMENTS, adapted_session, rows, session_in, train_and_die, when_noted
from tests.session.test_runs import often
from tests.tiny_models import llama, same_state
from tests.training.support import weights

STEPS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 8}
EPOCHS: dict[str, Any] = {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "steps": (5, STEPS),
    "epochs": (6, EPOCHS),
    "a sweep": (5, {**STEPS, "learning_rate": sweep(0.01, 0.03)}),
    "the last of its patience": (3, {**STEPS, "learning_rate": 3.0, "patience": 2}),
}
HELD = rows()[:6]


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    return {**ARGUMENTS, "gradient_accumulation_steps": 1, "lr_scheduler_type": "linear", **case}


def found(result: Any, model: Any) -> tuple[Any, ...]:
    state = result.state
    curves = (state.history, state.eval_history, state.best_step, result.steps, state.status)
    return *curves, [(one.history, one.eval_history) for one in state.members], weights(model, model.active_adapters[0])


def resumed(place: Path) -> tuple[Any, ...]:
    back = session_in(place).resume(model=llama(), variable="model", data=rows(), eval_data=HELD)
    return found(back.training, back.model)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_before_an_evaluation_makes_it_when_it_is_resumed(case: str, tmp_path: Path) -> None:
    step, given = CASES[case]
    session, model = adapted_session(tmp_path / "whole")
    whole = found(session.train(model, rows(), HELD, **arguments(given)), model)
    session, model = adapted_session(tmp_path / "parts")
    session.on_run(lambda run, name: when_noted(run, step, run.control.request_stop))
    first = session.train(model, rows(), HELD, **arguments(given))
    assert (first.status, first.steps) == ("stopped", step)
    assert step not in dict(first.state.eval_history) and step in dict(whole[1])
    back = resumed(tmp_path / "parts")
    assert back[:-1] == whole[:-1] and same_state(back[-1], whole[-1])


def dying_in_an_evaluation() -> None:
    """Makes a process die in the second evaluation of its run; the state of the step before is on disk."""
    often()
    kind, calls = transformers.Trainer, []
    evaluation: Any = kind.evaluation_loop

    def evaluating(self: Any, *args: Any, **more: Any) -> Any:
        calls.append(1)
        return die() if len(calls) == 2 else evaluation(self, *args, **more)

    kind.evaluation_loop = evaluating  # type: ignore[method-assign]


def test_a_run_that_was_killed_in_the_evaluation_of_an_epoch_makes_it_when_it_is_resumed(tmp_path: Path) -> None:
    session, model = adapted_session(tmp_path / "whole")
    whole = found(session.train(model, rows(), HELD, **arguments(EPOCHS)), model)
    given = arguments(EPOCHS)
    assert train_and_die(tmp_path / "parts", 99, dying_in_an_evaluation, eval_data=HELD, **given)
    back = resumed(tmp_path / "parts")
    assert back[:-1] == whole[:-1] and same_state(back[-1], whole[-1])
