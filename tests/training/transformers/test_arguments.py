"""Arguments that no run can begin with: one line, before anything of the model changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbpeft.errors import ConfigError, NbpeftError, TrainingError, TrainingInterrupted
from nbpeft.training import RunControl, train
from tests.tiny_models import llama
from tests.training.support import token_rows, trainable, weights

IMPOSSIBLE = [
    ({"torch_compile_mode": "x"}, "torch_compile_mode 'x' is unknown. It is one of: default"),
    ({"torch_compile": True, "torch_compile_backend": "x"}, "'X' is not a valid DynamoBackend"),
    ({"max_steps": 0}, "max_steps must be at least 1, not 0; leave it out to train num_train_epochs"),
    ({"max_steps": -3}, "max_steps must be at least 1, not -3"),
    ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs must be greater than 0, not 0"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, not -1"),
    ({"resume_from_checkpoint": True}, "resume_from_checkpoint=True needs output_dir=…"),
    ({"deepspeed": "x"}, "Invalid training arguments: "),
    ({"trainer_class": 5}, "trainer_class must be a class derived from Trainer, not 5"),
    ({"arguments_class": dict}, "arguments_class must be a class derived from TrainingArguments"),
    ({"output_dir": ""}, "output_dir must be a folder, not ''"),
    ({"output_dir": 5}, "output_dir must be a text, not 5"),
    ({"neftune_noise_alpha": "x"}, "neftune_noise_alpha must be a number, not 'x'"),
    ({"neftune_noise_alpha": float("inf")}, "neftune_noise_alpha must be a number, not inf"),
    ({"learning_rate": float("nan")}, "learning_rate must be a number, not nan"),
    ({"learning_rate": 10**400}, "learning_rate must be a number, not an integer of more than 64 bits"),
    ({"seed": 10**5000}, "seed must be a whole number, not an integer of more than 64 bits"),
    ({"bf16": "yes"}, "bf16 must be True or False, not 'yes'"),
    ({"gradient_checkpointing": print}, "gradient_checkpointing must be True or False, not <built-in function print>"),
    ({"torch_compile_mode": print}, "torch_compile_mode <built-in function print> is unknown."),
    ({"data_collator": 5}, "data_collator must be a function, not 5"),
    ({"compute_loss_func": 5}, "compute_loss_func must be a function, not 5"),
    ({"callbacks": 5}, "callbacks must be a list of TrainerCallbacks, not 5"),
    ({"optimizers": (None, 5)}, "optimizers must be an optimizer and a scheduler"),
    ({"optim": "adamw_torc"}, "optim 'adamw_torc' is unknown. Did you mean 'adamw_torch'"),
    ({"optim": "x"}, "optim 'x' is unknown. It is one of: adamw_torch"),
    ({"optim": "adafactor", "optim_args": "x"}, "The run cannot start with these arguments: "),
    ({"lr_scheduler_kwargs": {"x": 1}}, "The run cannot start with these arguments: "),
    ({"lr_scheduler_kwargs": 5}, "lr_scheduler_kwargs must be a dictionary or a text, not 5"),
    ({"adam_beta1": 5}, "adam_beta1 must be less than 1, not 5"),
    ({"adam_beta2": -0.5}, "adam_beta2 must be at least 0, not -0.5"),
    ({"weight_decay": -1}, "weight_decay must be at least 0, not -1"),
    ({"label_smoothing_factor": 2}, "label_smoothing_factor must be at most 1, not 2"),
    ({"logging_steps": -1}, "logging_steps must be a whole number of at least 1, or a share of all steps between"),
    ({"eval_steps": 1.5}, "eval_steps must be a whole number of at least 1, or a share of all steps between"),
    ({"neftune_noise_alpha": -1}, "neftune_noise_alpha must be at least 0, not -1"),
    ({"max_grad_norm": -1}, "max_grad_norm must be at least 0, not -1"),
    ({"save_total_limit": 0}, "save_total_limit must be at least 1, not 0"),
    ({"seed": -1}, "seed must be at least 0, not -1"),
    ({"log_level": "x"}, "Trainer refuses these arguments: KeyError: 'x'"),
    ({"accelerator_config": 5}, "accelerator_config must be a dictionary or a text, not 5"),
    ({"accelerator_config": {"x": 1}}, "Invalid training arguments: "),
    ({"label_names": 5}, "label_names must be a list, not 5"),
]


@pytest.fixture
def model() -> Any:
    """A model with ``a``, active and merged, and ``b``."""
    made = trainable(llama(), "a")
    made.add_adapter("b", made.peft_config["a"])
    made.manager.activate("a")
    made.manager.merge()
    return made


def state_of(model: Any) -> tuple[Any, ...]:
    manager = model.manager
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return manager.active, manager.merged, manager.enabled, set(manager.frozen), flags, model.training


@pytest.mark.filterwarnings("ignore:adapters are merged")
@pytest.mark.parametrize(("arguments", "message"), IMPOSSIBLE)
def test_a_run_that_cannot_start_is_one_line_and_changes_nothing(
    model: Any, arguments: dict[str, Any], message: str
) -> None:
    before, tensors = state_of(model), {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        train(model, token_rows(4), adapter="b", **{"max_steps": 1, **arguments})
    line = str(caught.value)
    assert message in line
    assert "\n" not in line and len(line) < 400
    assert state_of(model) == before
    assert all(torch.equal(part, tensors[name]) for name, part in model.state_dict().items())


@pytest.mark.parametrize("adapter", ["nope", "a"])
def test_an_adapter_that_cannot_train(model: Any, adapter: str) -> None:
    before = state_of(model)
    with pytest.raises(NbpeftError, match="'nope' not found" if adapter == "nope" else "Merged adapters cannot"):
        train(model, token_rows(4), adapter=adapter, max_steps=1)
    assert state_of(model) == before


def test_a_frozen_adapter_is_not_left_active(model: Any) -> None:
    model.manager.frozen.add("b")
    before = state_of(model)
    with pytest.warns(UserWarning, match="merged"), pytest.raises(TrainingError, match="Nothing is trainable"):
        train(model, token_rows(4), adapter="b", max_steps=1)
    assert state_of(model) == before


@pytest.mark.filterwarnings("ignore:adapters are merged")
def test_adapters_that_were_off_are_off_again(model: Any) -> None:
    model.manager.unmerge()
    model.manager.disable()
    before = state_of(model)
    with pytest.raises(ConfigError, match="cannot start"):
        train(model, token_rows(4), adapter="b", max_steps=1, lr_scheduler_kwargs={"x": 1})
    assert state_of(model) == before
    train(model, token_rows(4), adapter="b", max_steps=1)
    assert model.manager.enabled and model.manager.active == ("b",)


@pytest.mark.filterwarnings("ignore:adapters are merged")
def test_the_adapter_trained_stays_active(model: Any) -> None:
    before = weights(model, "b")
    result = train(model, token_rows(8), adapter="b", max_steps=2, learning_rate=0.01)
    assert (result.adapter, result.steps) == ("b", 2)
    assert model.manager.active == ("b",) and model.manager.merged == ()
    assert any(not torch.equal(part, before[name]) for name, part in weights(model, "b").items())


@pytest.mark.filterwarnings("ignore:adapters are merged")
def test_an_error_after_a_step_keeps_what_was_learned(model: Any) -> None:
    rows = token_rows(8)
    calls: list[int] = []

    def collate(batch: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no more rows")
        return {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}

    with pytest.raises(RuntimeError, match="no more rows"):
        train(model, rows, adapter="b", max_steps=5, per_device_train_batch_size=1, data_collator=collate)
    assert model.manager.active == ("b",) and model.manager.merged == ()


@pytest.mark.filterwarnings("ignore:adapters are merged")
def test_stopped_before_the_first_step_nothing_is_switched(model: Any) -> None:
    before = state_of(model)
    control = RunControl()

    def stop(batch: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted) as interrupted:
        train(model, token_rows(4), adapter="b", max_steps=3, data_collator=stop, control=control)
    assert (interrupted.value.result.status, interrupted.value.result.steps) == ("stopped", 0)
    assert state_of(model) == before


def test_objects_of_other_libraries_are_left_to_them(model: Any) -> None:
    from transformers.trainer_pt_utils import AcceleratorConfig

    model.manager.unmerge()
    before = weights(model)
    train(model, token_rows(8), max_steps=1, learning_rate=0.01, accelerator_config=AcceleratorConfig())
    assert any(not torch.equal(part, before[name]) for name, part in weights(model).items())
