"""What a Trainer reports becomes figures of the run, and processes decide together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from nbpeft.training.monitor import callback
from nbpeft.training.monitor.callback import RunCallback, any_process, metrics_of
from nbpeft.training.monitor.run import Run
from tests.tiny_models import llama


@pytest.mark.parametrize(("given", "planned"), [(0, None), (-1, None), (7, 7)])
def test_the_number_of_steps_is_known_when_it_is_given(given: int, planned: int | None) -> None:
    run = Run(llama(), None)
    arguments = TrainingArguments(use_cpu=True, report_to="none")
    RunCallback(run).on_train_begin(arguments, TrainerState(max_steps=given), TrainerControl())
    assert run.total_steps == planned


def test_metrics_are_the_numbers_of_an_evaluation_but_its_loss_and_times() -> None:
    times = {"eval_runtime": 3.0, "eval_samples_per_second": 4.0}
    others = {"eval_loss": 2.0, "eval_matrix": [1], "epoch": 1.0, "loss": 4}
    metrics = {"eval_accuracy": 0.5, "eval_rewards/margins": 1}
    assert metrics_of(times | others | metrics) == {"accuracy": 0.5, "eval_rewards/margins": 1.0}


@pytest.mark.parametrize("elsewhere", [0, 1])
@pytest.mark.parametrize("here", [False, True])
def test_a_flag_of_any_process_counts_in_each(here: bool, elsewhere: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(flags: Tensor, operation: object) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        flags.clamp_(min=elsewhere)

    monkeypatch.setattr(callback, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert any_process(here, torch.device("cpu")) == (here or elsewhere == 1)
    monkeypatch.setattr(callback, "is_distributed", lambda: False)
    assert any_process(here, torch.device("cpu")) == here
