"""Methods that remember something of a training: stopped anywhere and resumed, it ends as if nothing had happened."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from nbpeft import AdaLoraConfig, AdamssConfig, CPTConfig, PeftModel, PveraConfig, get_peft_model
from nbpeft.engine.contract.registry import methods
from nbpeft.engine.runtime.snapshots import restore, snapshot
from nbpeft.errors import TrainingInterrupted
from nbpeft.runs.store import RunPlace, RunStore
from nbpeft.training import RunControl, train
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, same_state
from tests.training.support import token_rows

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
ADALORA = AdaLoraConfig(**TARGETS, init_r=6, target_r=1, total_step=16, tinit=2, tfinal=3, lora_alpha=16)
CASES: dict[str, Any] = {
    "AdaLoRA": ADALORA,
    "AdaMSS": AdamssConfig(
        **{**TARGETS, "r": 6, "num_subspaces": 3, "subspace_rank": 2, "use_asa": True, "asa_target_subspaces": 3},
        **{"init_warmup": 2, "final_warmup": 14, "mask_interval": 3},
    ),
    "PVeRA": PveraConfig(**TARGETS, r=8, generator_seed=3),
}
SETTINGS: dict[str, Any] = {
    "max_steps": 16,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.02,
    "lr_scheduler_type": "cosine",
}


def made(config: Any) -> PeftModel:
    torch.manual_seed(11)
    return get_peft_model(llama(), copy.deepcopy(config), "sql").train()


def tensors(model: Any) -> dict[str, Tensor]:
    """Those of the adapter, with the ranks that went."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if "base_layer" not in name}


class At(TrainerCallback):
    """Does something after a step, or after the first batch of the next one."""

    def __init__(self, step: int, act: Any, *, inside: bool = False) -> None:
        self.step, self.act, self.inside = step, act, inside

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.inside:
            self.act()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.inside:
            self.act()


def interrupt() -> None:
    raise KeyboardInterrupt


def broken_off(place: Path, config: Any, step: int, *, inside: bool = False, **more: Any) -> PeftModel:
    """A training that ended after a step; its folder holds the state."""
    model, control = made(config), RunControl()
    act: Any = interrupt if inside else control.request_stop
    options = {"callbacks": [At(step, act, inside=inside)], "control": control, "run_dir": place, **SETTINGS, **more}
    try:
        train(model, token_rows(24), **options)
    except TrainingInterrupted:
        assert inside
    return model


def resumed(place: Path, model: Any = None, **more: Any) -> tuple[PeftModel, Any]:
    """Resumes it, with the adapter that is read from the state unless a model has it."""
    (record,) = RunStore(place).records()
    state = Path(record.path, f"checkpoint-{record.kept_steps[0]}")
    if model is None:
        model = PeftModel.from_pretrained(llama(), state / "sql", "sql", is_trainable=True)
    options = {"run_dir": RunPlace(RunStore(place), record.name), "resume_from_checkpoint": str(state)}
    return model, train(model, token_rows(24), **{**SETTINGS, **more, **options})


@pytest.fixture(scope="module")
def unbroken() -> Iterator[Any]:
    found: dict[str, Any] = {}

    def of(case: str) -> Any:
        if case not in found:
            model = made(CASES[case])
            result = train(model, token_rows(24), **SETTINGS)
            found[case] = (result.state.history, tensors(model), model.peft_config["sql"].to_dict())
        return found[case]

    yield of


@pytest.mark.drawn(1)
@pytest.mark.parametrize(("case", "step"), [("AdaLoRA", 3), *((case, 11) for case in CASES)])
def test_a_resumed_training_ends_as_if_nothing_had_happened(
    case: str, step: int, unbroken: Any, tmp_path: Path
) -> None:
    """In a new process, and on the model that went on meanwhile: losses, weights and who has gone, bit for bit."""
    losses, expected, config = unbroken(case)
    there = broken_off(tmp_path, CASES[case], step)
    model, result = resumed(tmp_path)
    assert result.state.history == losses and same_state(tensors(model), expected)
    assert model.peft_config["sql"].to_dict().get("rank_pattern") == config.get("rank_pattern")
    assert result.message == ""
    with torch.no_grad():  # the state decides, not what the adapter is now
        for parameter in there.manager.parameters("sql"):
            parameter.add_(1.0)
    again = broken_off(tmp_path / "again", CASES[case], step)
    train(again, token_rows(8), **SETTINGS | {"max_steps": 3})
    model, result = resumed(tmp_path / "again", again)
    assert result.state.history == losses and same_state(tensors(model), expected)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("case", CASES)
def test_a_training_that_ended_inside_a_step_resumes_at_its_start(case: str, unbroken: Any, tmp_path: Path) -> None:
    losses, expected, _ = unbroken(case)
    broken_off(tmp_path, CASES[case], 5, inside=True)
    model, result = resumed(tmp_path)
    assert result.state.history == losses and same_state(tensors(model), expected)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("case", ["AdaLoRA", "AdaMSS"])
def test_a_checkpoint_of_a_trainer_resumes_as_well(case: str, unbroken: Any, tmp_path: Path) -> None:
    _, expected, _ = unbroken(case)
    train(made(CASES[case]), token_rows(24), output_dir=str(tmp_path), save_steps=7, save_strategy="steps", **SETTINGS)
    model = made(CASES[case])
    train(model, token_rows(24), resume_from_checkpoint=str(tmp_path / "checkpoint-7"), **SETTINGS)
    assert same_state(tensors(model), expected)


def test_a_layer_without_a_rank_trains(tmp_path: Path) -> None:
    """Its parameters have no elements, nor have their gradients."""
    model = made(ADALORA)
    train(model, token_rows(24), **SETTINGS)
    assert not all(any(left) for left in model.peft_config["sql"].rank_pattern.values())
    model.save_pretrained(str(tmp_path))
    small = PeftModel.from_pretrained(llama(), tmp_path / "sql", "sql", is_trainable=True)
    assert 0 in {layer.adapter("sql").rank for layer in small.manager.layers.values()}
    assert train(small, token_rows(24), **SETTINGS | {"max_steps": 2}).steps == 2


@pytest.mark.drawn(2)
@pytest.mark.parametrize("where", ["a new process", "on the model"])
@pytest.mark.parametrize("case", CASES)
def test_a_state_of_an_earlier_version_is_resumed_and_the_run_says_so(case: str, where: str, tmp_path: Path) -> None:
    """It has the ranks alone that are left, and nothing of what was measured."""
    step = 11
    there = broken_off(tmp_path, CASES[case], step)
    (state,) = (folder for folder in tmp_path.glob(f"*/checkpoint-{step}"))
    (state / "method_state.safetensors").unlink()
    there.save_pretrained(str(state))
    _, result = resumed(tmp_path, made(CASES[case]) if where == "on the model" else None)
    assert result.steps == 16
    assert result.message == (
        f"checkpoint-{step} lacks the method's training state (an earlier version wrote it), "
        "which starts from its initial value"
    )


# Putting back, and files


class Losses:
    """``compute_metrics`` of which the best value is that of one evaluation."""

    def __init__(self, best: int) -> None:
        self.best, self.calls = best, 0

    def __call__(self, predictions: Any) -> dict[str, float]:
        self.calls += 1
        return {"accuracy": float(self.calls == self.best)}


@pytest.mark.drawn(2)
@pytest.mark.parametrize("how", ["patience", "load_best_model_at_end"])
@pytest.mark.parametrize("case", ["AdaLoRA", "AdaMSS"])
def test_the_best_state_has_the_ranks_of_its_step(case: str, how: str, tmp_path: Path) -> None:
    """And so its file gives the model."""
    settings = {"eval_steps": 4, "metric_for_best_model": "accuracy", "compute_metrics": Losses(2), **SETTINGS}
    best: dict[str, Any] = {}
    model = made(CASES[case])
    noting = At(8, lambda: best.update(tensors(model)))
    train(
        model,
        token_rows(24),
        token_rows(4, 5),
        callbacks=[noting],
        **{how: 2 if how == "patience" else True},
        **settings,
    )
    assert same_state(tensors(model), best)
    expected = logits(model.eval())
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(llama(), tmp_path / "sql", "sql").eval()
    assert_close(logits(again), expected)


def test_an_adapter_without_ranks_loses_more_of_them(tmp_path: Path) -> None:
    """Of six four are left, which a file holds; of these training leaves two, which the next file holds."""
    model = made(AdaLoraConfig(**TARGETS, init_r=6, target_r=4, total_step=8, lora_alpha=16, orth_reg_weight=0.0))
    for steps, ranks in ((8, 16), (8, 8)):
        train(model, token_rows(24), **SETTINGS | {"max_steps": steps})
        left = [sum(flags) for flags in model.peft_config["sql"].rank_pattern.values()]
        assert sum(left) == ranks and all(len(flags) == 6 for flags in model.peft_config["sql"].rank_pattern.values())
        expected = logits(model.eval())
        model.save_pretrained(str(tmp_path / str(ranks)))
        model = PeftModel.from_pretrained(llama(), tmp_path / str(ranks) / "sql", "sql", is_trainable=True)
        assert_close(logits(model.eval()), expected)
        model.train().peft_config["sql"].target_r = 2


def test_an_adapter_that_is_put_back_has_the_ranks_it_had() -> None:
    model = made(ADALORA)
    train(model, token_rows(24), **SETTINGS | {"max_steps": 6})
    kept = snapshot(model.manager, "sql")
    before, ranks = logits(model.eval()), copy.deepcopy(model.peft_config["sql"].rank_pattern)
    train(model.train(), token_rows(24), **SETTINGS)
    assert model.peft_config["sql"].rank_pattern != ranks
    restore(model.manager, kept)
    assert model.peft_config["sql"].rank_pattern == ranks
    assert_close(logits(model.eval()), before)


# The rule

SAMPLES = {
    method.label: (method.config_class, dict(next(iter(method.sample_configs.values()))))
    for method in methods()
    if method.sample_configs and method.label not in ("multitask prompt tuning", "CPT")
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", [*SAMPLES, "CPT"])
def test_every_method_resumes_bit_for_bit(label: str, tmp_path: Path) -> None:
    if label == "CPT":
        types = {"cpt_token_ids": [5, 7, 9, 3], "cpt_tokens_type_mask": [1, 2, 3, 4]}
        config: Any = CPTConfig(task_type="CAUSAL_LM", **types)
    else:
        kind, fields = SAMPLES[label]
        config = kind(**copy.deepcopy(fields))
    settings = {"max_steps": 6, "gradient_accumulation_steps": 1}
    whole = made(config)
    result = train(whole, token_rows(24), **SETTINGS | settings)
    broken_off(tmp_path, config, 3, **settings)
    model, after = resumed(tmp_path, **settings)
    assert after.state.history == result.state.history and same_state(tensors(model), tensors(whole))
