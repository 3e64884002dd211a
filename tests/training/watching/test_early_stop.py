"""Patience: an evaluation that is no better counts, and the best state is put back without a folder."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nbpeft.errors import ConfigError, TrainingInterrupted
from nbpeft.runs.store import RunPlace, RunStore
from nbpeft.training import train
from nbpeft.training.adapters import snapshot
from nbpeft.training.monitor.control import RunControl
from nbpeft.training.watching.early_stop import EarlyStop
from tests.training.support import token_rows, trainable, weights

SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 0.05, "max_steps": 40}


class Kept(TrainerCallback):
    """The weights after each evaluation, and when it was; may fail at a step."""

    def __init__(self, model: Any, interrupt_at: int = -1) -> None:
        self.model, self.interrupt_at = model, interrupt_at
        self.losses: dict[int, float] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.losses[state.global_step] = metrics["eval_loss"]
        self.weights[state.global_step] = weights(self.model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.interrupt_at:
            raise KeyboardInterrupt


def trained(kept: Kept | None = None, **more: Any) -> tuple[Any, Kept, Any]:
    model = trainable()
    kept = Kept(model) if kept is None else kept
    kept.model = model
    # Rows of noise learned by heart: evaluation on other noise gets worse soon.
    return model, kept, train(model, token_rows(8), token_rows(8, 5), callbacks=[kept], **{**SETTINGS, **more})


def test_it_stops_and_puts_the_best_state_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    model, kept, result = trained(patience=3, eval_steps=1)
    best = min(kept.losses, key=lambda step: kept.losses[step])
    assert result.status == "finished" and result.steps == best + 3 < 40
    assert result.best_step == best
    assert all(torch.equal(value, kept.weights[best][name]) for name, value in weights(model).items())
    assert (
        result.message
        == f"stopped early: no improvement in 3 evaluations · the best weights, of step {best}, were restored"
    )
    assert f"best at step {best}" in str(result)
    assert list(tmp_path.iterdir()) == []


def test_it_evaluates_ten_times_where_nobody_said_when():
    _, kept, result = trained(patience=3, max_steps=20)
    assert list(kept.losses)[:2] == [2, 4]
    assert result.best_step in kept.losses


@pytest.mark.parametrize(
    "fields", [{"eval_steps": 3}, {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}]
)
def test_a_patience_that_a_run_cannot_use_up_is_told(fields: dict[str, Any]) -> None:
    told = "patience=2 cannot stop this run early, which has 2 evaluations: lower eval_steps"
    _, _, result = trained(patience=2, **{"max_steps": 6, **fields})
    assert result.state.warnings == (told,)
    assert not trained(patience=1, **{"max_steps": 6, **fields})[2].state.warnings


def test_an_interrupted_run_keeps_the_best_too():
    kept = Kept(None, interrupt_at=6)
    model = trainable()
    kept.model = model
    with pytest.raises(TrainingInterrupted) as caught:
        train(model, token_rows(8), token_rows(8, 5), callbacks=[kept], patience=50, eval_steps=1, **SETTINGS)
    best = min(kept.losses, key=lambda step: kept.losses[step])
    assert caught.value.result.best_step == best
    assert all(torch.equal(value, kept.weights[best][name]) for name, value in weights(model).items())


def test_a_second_interruption_does_not_mix_two_states(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, put_back = snapshot.trainable, EarlyStop._restore
    putting: list[bool] = []

    def interrupted(model: Any) -> Any:
        for number, pair in enumerate(tensors(model)):
            if putting and number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield pair

    monkeypatch.setattr(snapshot, "trainable", interrupted)
    monkeypatch.setattr(EarlyStop, "_restore", lambda self: [putting.append(True), put_back(self)])
    model = trainable()
    kept = Kept(model, interrupt_at=6)
    with pytest.raises(TrainingInterrupted):
        train(model, token_rows(8), token_rows(8, 5), callbacks=[kept], patience=50, eval_steps=1, **SETTINGS)
    best = min(kept.losses, key=lambda step: kept.losses[step])
    assert putting and best < 6
    assert all(torch.equal(value, kept.weights[best][name]) for name, value in weights(model).items())


@pytest.mark.drawn(1)
@pytest.mark.parametrize("how", ["Stop", "an interruption"])
def test_a_resumed_run_counts_on_and_has_the_best_state(tmp_path: Path, how: str):
    """The state it goes on from is that of its last step, though the model had the best one put back."""
    _, kept, whole = trained(patience=4, eval_steps=1)
    best = min(kept.losses, key=lambda step: kept.losses[step])
    model, control = trainable(), RunControl()

    class Ends(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            if how == "an interruption" and state.global_step == best + 2:
                raise KeyboardInterrupt

        def on_evaluate(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            if how == "Stop" and state.global_step == best + 2:
                control.request_stop()

    with contextlib.suppress(TrainingInterrupted):
        rows: Any = (token_rows(8), token_rows(8, 5))
        train(model, *rows, callbacks=[Ends()], patience=4, eval_steps=1, run_dir=tmp_path, control=control, **SETTINGS)
    assert all(torch.equal(value, kept.weights[best][name]) for name, value in weights(model).items())
    record = RunStore(tmp_path).records()[0]
    last = record.kept_steps[0]
    assert best < last < best + 4
    state = str(Path(record.path, f"checkpoint-{last}"))
    _, kept_again, _ = trained(eval_steps=1, eval_strategy="steps", max_steps=last + 1, resume_from_checkpoint=state)
    assert kept_again.losses[last + 1] == kept.losses[last + 1]
    place = RunPlace(RunStore(tmp_path), record.name)
    _, _, result = trained(patience=4, eval_steps=1, resume_from_checkpoint=state, run_dir=place)
    assert whole.steps == best + 4
    assert result.steps == best + 4
    assert f"the best weights, of step {best}, were restored" in result.message


def test_the_best_is_that_of_the_metric_asked_for():
    def accuracy(predictions: Any) -> dict[str, float]:
        accuracy.calls += 1  # type: ignore[attr-defined]
        return {"accuracy": [0.5, 0.9, 0.7, 0.6][min(accuracy.calls, 4) - 1]}  # type: ignore[attr-defined]

    accuracy.calls = 0  # type: ignore[attr-defined]
    _, _, result = trained(patience=2, eval_steps=2, metric_for_best_model="accuracy", compute_metrics=accuracy)
    assert (result.steps, result.best_step) == (8, 4)
    assert result.state.metrics == {"accuracy": 0.6}
    assert result.state.metric_history["accuracy"] == ((2, 0.5), (4, 0.9), (6, 0.7), (8, 0.6))
    assert "accuracy 0.600" in str(result)


class Accuracies:
    """``compute_metrics`` with the values that a test wants, the last one again and again."""

    def __init__(self, *values: float) -> None:
        self.values, self.calls = values, 0

    def __call__(self, predictions: Any) -> dict[str, float]:
        self.calls += 1
        return {"accuracy": self.values[min(self.calls, len(self.values)) - 1]}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "steps", "best"),
    [
        ((NAN, 0.5, 0.9, 0.6), 5, 3),  # a first one that is NaN is not the best
        ((INF, 0.5, 0.6, 0.1), 5, 3),  # nor is one that is infinite
        ((0.5, NAN, 0.9, NAN, INF), 5, 3),
        ((NAN,), 2, None),
    ],
)
def test_an_evaluation_that_is_not_finite_is_never_the_best(values: Any, steps: int, best: int | None) -> None:
    model, kept, result = trained(
        patience=2, eval_steps=1, metric_for_best_model="accuracy", compute_metrics=Accuracies(*values)
    )
    assert (result.steps, result.best_step) == (steps, best)
    expected = kept.weights[steps if best is None else best]
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())
    assert ("were restored" in result.message) == (best is not None)


def test_a_resumed_run_counts_evaluations_that_were_not_finite(tmp_path: Path) -> None:
    settings = {"patience": 3, "eval_steps": 1, "metric_for_best_model": "accuracy"}
    trained(**settings, max_steps=2, run_dir=tmp_path, compute_metrics=Accuracies(NAN))
    run = Path(RunStore(tmp_path).records()[0].path)
    state, place = str(run / "checkpoint-2"), RunPlace(RunStore(tmp_path), run.name)
    _, _, result = trained(**settings, run_dir=place, resume_from_checkpoint=state, compute_metrics=Accuracies(NAN))
    assert result.steps == 3


def test_a_checkpoint_of_an_infinite_metric_is_not_the_best() -> None:
    model, kept, result = trained(
        load_best_model_at_end=True,
        max_steps=3,
        eval_steps=1,
        metric_for_best_model="accuracy",
        compute_metrics=Accuracies(INF, 0.9, NAN),
    )
    assert result.best_step == 2
    assert all(torch.equal(value, kept.weights[2][name]) for name, value in weights(model).items())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"patience": 0}, "number of evaluations"),
        ({"patience": True}, "number of evaluations"),
        ({"patience": "3"}, "number of evaluations"),
        ({"patience": 3, "eval_data": None}, "needs evaluation data"),
        ({"patience": 3, "load_best_model_at_end": True}, "remove load_best_model_at_end"),
        ({"patience": 3, "eval_strategy": "no"}, "needs evaluations"),
    ],
)
def test_a_patience_that_cannot_be_is_one_line(given: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        train(trainable(), token_rows(), **{"eval_data": token_rows(4), **SETTINGS, **given})
