"""Trainings compute activations and norms again: what they learn, how long it lasts, and how to turn it off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from nbpeft.errors import ConfigError, TrainingInterrupted
from nbpeft.memory.saved import SavedTensors
from nbpeft.training import Collator, Trainer, train
from tests.closeness import assert_close
from tests.training.support import token_rows, trainable, weights

QUICK: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


def changed(model: nn.Module) -> int:
    """How many modules have a forward of their own."""
    return sum("forward" in vars(module) for module in model.modules())


class Watching(TrainerCallback):
    """Counts changed modules at each step, and does something at the second."""

    def __init__(self, model: nn.Module, then: Callable[[], None] = lambda: None) -> None:
        self.model, self.then = model, then
        self.counts: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counts.append(changed(self.model))
        if state.global_step == 2:
            self.then()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_learns_the_same_and_keeps_less(dropout: float) -> None:
    learned: list[dict[str, torch.Tensor]] = []
    kept: list[int] = []
    for recompute in (False, True):
        model = trainable(target_modules="all-linear", lora_dropout=dropout)
        watching = Watching(model)
        with SavedTensors(model) as saved:
            result = train(model, token_rows(), callbacks=[watching], recompute=recompute, **QUICK)
        assert result.steps == 3 and changed(model) == 0
        assert watching.counts == [7 if recompute else 0] * 3  # five norms and two activations
        learned.append(weights(model))
        kept.append(saved.peak)
    assert kept[1] < 0.8 * kept[0]
    for name, weight in learned[0].items():
        assert_close(learned[1][name], weight)


def attributes(model: nn.Module) -> dict[str, set[str]]:
    """Of every module but the model itself, on which a Trainer leaves its own."""
    return {name: set(vars(module)) for name, module in model.named_modules() if name}


def fail() -> None:
    raise ZeroDivisionError


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("then", "error"), [(fail, ZeroDivisionError), (interrupt, TrainingInterrupted)])
def test_nothing_stays_after_a_training_that_ends_early(then: Any, error: Any) -> None:
    model = trainable()
    before = attributes(model)
    watching = Watching(model, then)
    with pytest.raises(error):
        train(model, token_rows(), callbacks=[watching], **QUICK)
    assert watching.counts[0] > 0
    assert attributes(model) == before


def test_samples_and_evaluations_are_those_of_the_model() -> None:
    losses = [
        train(trainable(), token_rows(), token_rows(4, seed=1), recompute=recompute, **QUICK).eval_loss
        for recompute in (False, True)
    ]
    assert_close(losses[0], losses[1])


def test_the_trainer_itself_takes_it(tmp_path: Any) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, save_strategy="no", **QUICK)
    for recompute in (True, False):
        model = trainable()
        watching = Watching(model)
        collator = Collator(pad_token_id=0, copy_labels=True)
        rows: Any = token_rows()
        Trainer(model, args, collator, rows, callbacks=[watching], recompute=recompute).train()
        assert bool(watching.counts[0]) is recompute and changed(model) == 0


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_anything_but_true_and_false_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="recompute must be True or False"):
        Trainer(trainable(), recompute=value)
