"""The learning rate of a training that is given none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import nbpeft
from nbpeft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from nbpeft.training import train
from nbpeft.training.loop.learning_rate import with_learning_rate
from nbpeft.training.objectives.objective import objective_named
from nbpeft.training.request import TrainRequest
from tests.tiny_models import llama
from tests.training.objectives.trl_run import ROWS
from tests.training.support import token_rows, trainable
from tests.training.trl_run import tiny_base, tiny_tokenizer


def adapted(width: int | None, config: Any = None) -> Any:
    """A model whose config says that it has a width."""
    model = get_peft_model(llama(), config or LoraConfig(r=2, target_modules=["q_proj"]))
    if width is not None:
        model.get_base_model().config.hidden_size = width
    return model


def resolved(model: Any, objective: str = "sft", **given: Any) -> TrainRequest:
    return with_learning_rate(TrainRequest.of(model, token_rows(), **given), objective_named(objective)())


@pytest.mark.parametrize(
    ("width", "config", "objective", "rate", "reason"),
    [
        (576, None, "sft", 1.3e-3, "learning rate 1.3e-3: LoRA's for a width of 576"),
        (4096, None, "sft", 2.9e-4, "learning rate 2.9e-4: LoRA's for a width of 4,096"),
        (4096, None, "classify", 2.9e-4, "learning rate 2.9e-4: LoRA's for a width of 4,096"),
        (None, None, "sft", 2e-3, "learning rate 2e-3: LoRA's for a width of 32"),
        (4096, None, "dpo", 2.9e-5, "learning rate 2.9e-5: 0.1 times LoRA's for a width of 4,096"),
        (4096, None, "kto", 2.9e-5, "learning rate 2.9e-5: 0.1 times LoRA's for a width of 4,096"),
        (4096, None, "grpo", 2.9e-5, "learning rate 2.9e-5: 0.1 times LoRA's for a width of 4,096"),
        (4096, None, "reward", 8.6e-5, "learning rate 8.6e-5: 0.3 times LoRA's for a width of 4,096"),
        (4096, IA3Config(target_modules=["k_proj"]), "sft", 5.7e-3, "5.7e-3: 20 times LoRA's for a width of 4,096"),
        (4096, VeraConfig(target_modules=["q_proj"]), "sft", 1.1e-2, "0.011: 40 times LoRA's for a width of 4,096"),
    ],
)
def test_it_follows_from_width_method_and_objective(
    width: int | None, config: Any, objective: str, rate: float, reason: str
) -> None:
    found = resolved(adapted(width, config), objective)
    assert found.arguments == {"learning_rate": rate}
    assert found.rate_reason.endswith(reason)


def test_a_model_without_a_width_has_the_rate_of_one_in_between() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    found = resolved(get_peft_model(plain, LoraConfig(r=2, target_modules=["0"])))
    assert (found.arguments["learning_rate"], found.rate_reason) == (5e-4, "learning rate 5e-4: LoRA's")


def test_a_rate_of_the_user_wins_also_in_a_sweep() -> None:
    for given in (7e-5, nbpeft.sweep(1e-4, 3e-4)):
        found = resolved(adapted(576), learning_rate=given)
        assert found.arguments["learning_rate"] is given and not found.rate_reason


def test_adapters_side_by_side_have_the_rates_of_their_methods() -> None:
    model = adapted(4096)
    model.add_adapter("ia3", IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model.add_adapter("own", LoraConfig(r=2, target_modules=["q_proj"]))
    found = resolved(model, members={"default": {}, "ia3": {}, "own": {"learning_rate": 1e-4}})
    assert found.arguments == {"learning_rate": 2.9e-4}
    assert found.members == {"default": {}, "ia3": {"learning_rate": 5.7e-3}, "own": {"learning_rate": 1e-4}}
    all_given = {name: {"learning_rate": 1e-4} for name in found.members}
    assert "learning_rate" not in resolved(model, members=all_given).arguments


def test_the_card_says_it_and_the_run_keeps_it(tmp_path: Path) -> None:
    result = train(trainable(), token_rows(), max_steps=2, run_dir=tmp_path)
    assert "learning rate 2e-3: LoRA's for a width of 32" in result.message
    (kept,) = tmp_path.rglob("run.json")
    assert json.loads(kept.read_text(encoding="utf-8"))["arguments"]["learning_rate"] == 2e-3
    assert result.state.series["learning rate"][0][1] == pytest.approx(2e-3)
    given = train(trainable(), token_rows(), max_steps=2, learning_rate=1e-3)
    assert "learning rate" not in given.message


def test_preferences_are_trained_with_a_tenth() -> None:
    result = train(trainable(tiny_base()), ROWS, tokenizer=tiny_tokenizer(), max_steps=1)
    assert result.objective == "dpo" and "learning rate 2e-4: 0.1 times LoRA's" in result.message
    assert result.state.series["learning rate"][0][1] == pytest.approx(2e-4)


def test_a_trainer_keeps_the_default_of_transformers(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = nbpeft.Trainer(model=trainable(), args=arguments, train_dataset=token_rows())
    assert trainer.args.learning_rate == 5e-5
