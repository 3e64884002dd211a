"""AdaLoRA's ranks against peft's: the schedule, what goes, files without the ranks that went, who calls what."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, randomize, tokens

FIELDS: dict[str, Any] = {
    "init_r": 6,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 4,
    "deltaT": 2,
    "total_step": 16,
    "task_type": "CAUSAL_LM",  # without a task peft adds nothing to the loss
    "target_modules": ["q_proj", "down_proj"],
}


def pair(folder: Path) -> tuple[PeftModel, Any]:
    """The same start in both libraries."""
    ours = get_peft_model(llama(), nbpeft.AdaLoraConfig(**FIELDS))
    randomize(ours, scale=0.1)
    ours.save_pretrained(folder)
    return ours, peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True)


def test_what_its_layers_share_is_no_attribute_of_a_model() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model: Any = get_peft_model(base, nbpeft.AdaLoraConfig(**FIELDS | {"target_modules": ["0"], "task_type": None}))
    assert not hasattr(model, "config") and not hasattr(model, "adapters")
    assert not type(model.base_model).uses_shared_state  # of tensors


def train(model: Any, steps: int = 16) -> list[float]:
    ids, losses = tokens(), []
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def pattern_of(model: Any) -> dict[str, list[bool]]:
    pattern = model.peft_config["default"].rank_pattern
    return {name.replace(".default", ""): list(left) for name, left in pattern.items()}


def test_training_takes_the_ranks_that_peft_takes_and_files_go_both_ways(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "start")
    assert_close(train(ours), train(theirs))
    pattern = pattern_of(ours)
    assert pattern == pattern_of(theirs)
    assert sum(map(sum, pattern.values())) == 2 * len(pattern) and len({sum(left) for left in pattern.values()}) > 1
    expected = logits(ours.eval())
    assert_close(logits(theirs.eval()), expected)

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert {key: one.shape for key, one in files[0].items()} == {key: one.shape for key, one in files[1].items()}
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert_close(logits(loaded), expected)
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours", is_trainable=True).eval()
    assert_close(logits(again), expected)
    back = PeftModel.from_pretrained(llama(), tmp_path / "theirs").eval()
    assert_close(logits(back), logits(theirs))

    train(again)  # goes on with the ranks that are left
    again.save_pretrained(tmp_path / "again")
    assert all(len(left) == 6 for left in pattern_of(again).values())
    reloaded = PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    assert_close(logits(reloaded), logits(again.eval()))


def test_a_second_call_after_one_step_does_nothing(tmp_path: Path) -> None:
    once, twice = pair(tmp_path)[0], pair(tmp_path)[0]
    train(once)
    allocate = twice.base_model.update_and_allocate

    def called_twice(step: int) -> None:
        allocate(step)
        allocate(step + 1)

    twice.base_model.__dict__["update_and_allocate"] = called_twice
    train(twice)
    assert pattern_of(once) == pattern_of(twice) and torch.equal(logits(once.eval()), logits(twice.eval()))


def test_steps_of_a_fused_optimizer_count() -> None:
    model = get_peft_model(llama(), nbpeft.AdaLoraConfig(**FIELDS)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    for step in range(16):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad(set_to_none=False)
    pattern = pattern_of(model)
    assert len(pattern) == 4 and sum(map(sum, pattern.values())) == 2 * len(pattern)


def test_a_loop_that_calls_nothing_is_told_once_what_to_call() -> None:
    model = get_peft_model(llama(), nbpeft.AdaLoraConfig(**FIELDS)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = tokens()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    texts = [str(one.message) for one in caught if "update_and_allocate" in str(one.message)]
    assert len(texts) == 1 and "between optimizer.step() and zero_grad()" in texts[0]


def test_a_run_and_a_trainer_call_it_themselves(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    expected = get_peft_model(llama(), nbpeft.AdaLoraConfig(**FIELDS, init_lora_weights=False))
    expected.save_pretrained(tmp_path / "start")
    by_trainer = PeftModel.from_pretrained(llama(), tmp_path / "start", is_trainable=True)
    rows = [{"input_ids": row, "labels": row} for row in tokens().tolist()] * 16
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=16,
        per_device_train_batch_size=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=by_trainer, args=arguments, train_dataset=Dataset.from_list(rows))
    with nbpeft.start_run(by_trainer):
        trainer.train()
    pattern = pattern_of(by_trainer)
    assert len(pattern) == 4 and sum(map(sum, pattern.values())) == 2 * len(pattern)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"total_step": None}, "total_step must be a positive whole number"),
        ({"tinit": 12}, "leave no step of total_step = 16"),
        ({"orth_reg_weight": float("nan")}, "orth_reg_weight must be"),
        ({"beta1": 1.0}, "beta1 must be above 0 and below 1"),
        ({"use_dora": True}, "use_dora is not implemented"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight must not be negative"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True or False"),
        ({"rank_pattern": {"a.lora_E": [True]}}, "for each of init_r = 6 ranks"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        nbpeft.AdaLoraConfig(**FIELDS | fields)


@pytest.mark.parametrize("left", [None, [True, True], [True, False, True]], ids=str)
def test_a_file_with_fewer_ranks_takes_the_place_of_one_that_lost_some(left: Any, tmp_path: Path) -> None:
    def adapted(initial: int, left: list[bool] | None) -> Any:
        paths = [f"model.layers.{number}.self_attn.q_proj.lora_E" for number in range(2)]
        fields = {"init_r": initial, "target_r": 1, "total_step": 10, "target_modules": ["q_proj"]}
        config = nbpeft.AdaLoraConfig(**fields, rank_pattern=dict.fromkeys(paths, left) if left else None)
        model = get_peft_model(llama(), config).eval()
        randomize(model, seed=initial)
        return model

    wanted, model = adapted(len(left or [True] * 2), left), adapted(4, [True, False, True, False])
    wanted.save_pretrained(tmp_path / "fewer")
    nbpeft.hotswap_adapter(model, str(tmp_path / "fewer"), "default")
    assert torch.equal(logits(model), logits(wanted))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "again")), logits(wanted))
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("fewer", "again")]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    layer = next(iter(model.manager.layers.values()))
    assert layer.adapter("default").flags_of_places == (left or [True, True])


def test_the_number_of_ranks_is_counted_as_in_peft_and_in_no_file(tmp_path: Path) -> None:
    fields = {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["q_proj"], "lora_dropout": 0.25}
    made = [library.get_peft_model(llama(), library.AdaLoraConfig(**fields)) for library in (nbpeft, peft)]
    ours, theirs = made
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    layers: list[Any] = [model.base_model.model.model.layers[0].self_attn.q_proj for model in made]
    assert {float(layer.ranknum["default"]) for layer in layers} == {4.0}
    assert not any(layer.ranknum["default"].requires_grad for layer in layers)
    assert [layer.lora_dropout["default"].p for layer in layers] == [0.25, 0.25]
    assert len(layers[0].lora_embedding_A) == len(layers[1].lora_embedding_A) == 0
    ours.set_requires_grad("default", True)
    assert not layers[0].ranknum["default"].requires_grad
    ours.save_pretrained(tmp_path)
    assert not any("ranknum" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    read = nbpeft.PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in read.parameters())
    empty = nbpeft.get_peft_model(llama(), nbpeft.AdaLoraConfig(**fields), low_cpu_mem_usage=True)
    nbpeft.set_peft_model_state_dict(empty, load_file(tmp_path / "adapter_model.safetensors"), low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in empty.parameters())
