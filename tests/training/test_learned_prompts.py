"""Learned prompts in a training: as in a loop of one's own, resumed, side by side, and never packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nbpeft
from nbpeft.engine.contract.registry import methods
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.training import Collator, Trainer, TrainResult
from tests.closeness import assert_close
from tests.tiny_models import llama, randomize, tokens
from tests.training.transformers.test_trainer import arguments

CONFIGS = {
    f"{method.peft_type.lower()}-{name}": method.config_class(
        task_type="CAUSAL_LM", **fields | ({"num_tasks": 1} if "num_tasks" in fields else {})
    )
    for method in methods()
    if issubclass(method.config_class, nbpeft.PromptLearningConfig)
    for name, fields in method.sample_configs.items()
}
pytestmark = pytest.mark.filterwarnings("ignore")


def rows() -> list[dict[str, list[int]]]:
    return [
        {"input_ids": (ids := tokens(1, length, seed=length)[0].tolist()), "labels": ids} for length in range(5, 13)
    ]


def prompted(name: str) -> Any:
    model = nbpeft.get_peft_model(llama(), CONFIGS[name])
    randomize(model, scale=0.1)
    return model


def trained(name: str, folder: Path, **more: Any) -> tuple[Any, TrainResult]:
    model = prompted(name)
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none"}
    result = nbpeft.train(model, rows(), output_dir=str(folder), **settings | more)
    return model, result


def parameters(model: Any, name: str = "default") -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.manager.parameters(name)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p_tuning-lstm", "prefix_tuning-projected", "prompt_tuning-random"])
def test_a_training_with_chunks_is_one_without(name: str, tmp_path: Path) -> None:
    start = parameters(prompted(name))
    model, result = trained(name, tmp_path / "chunks")
    assert result.steps == 4 and not torch.equal(parameters(model), start)
    whole, _ = trained(name, tmp_path / "whole", loss_chunk_size=0)
    assert_close(parameters(model), parameters(whole))
    if "prefix" in name:
        with pytest.raises(AdapterError, match="does not work with gradient checkpointing"):
            trained(name, tmp_path / "checkpointed", gradient_checkpointing=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_not_packed(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prepends tokens to each sequence, not to each row"):
        trained(name, tmp_path / "packed", packing=True)


@pytest.mark.parametrize("name", ["cpt-two-examples", "p_tuning-lstm", "prefix_tuning-projected"])
def test_a_resumed_training_is_one_that_was_not_interrupted(name: str, tmp_path: Path) -> None:
    def trainer(folder: Path, **fields: Any) -> Any:
        args = arguments(folder, per_device_train_batch_size=2, disable_tqdm=True, **fields)
        return Trainer(prompted(name), args, Collator(), train_dataset=rows())

    whole = trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    trainer(tmp_path / "first", max_steps=4, save_strategy="steps", save_steps=2).train()
    resumed = trainer(tmp_path / "first", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert torch.equal(parameters(resumed.model), parameters(whole.model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpt-two-examples", "p_tuning-lstm", "prefix_tuning-plain", "prompt_tuning-random"])
def test_prompts_of_a_sweep_learn_as_alone(name: str, tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant"}
    model, _ = trained(name, tmp_path / "sweep", learning_rate=nbpeft.sweep(1e-2, 1e-1), **constant)
    for rate, adapter in ((1e-2, "default-lr1e-2"), (1e-1, "default-lr1e-1")):
        single, _ = trained(name, tmp_path / adapter, learning_rate=rate, **constant)
        assert_close(parameters(model, adapter), parameters(single))
