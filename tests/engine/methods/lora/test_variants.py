"""Variants of LoRA beside peft: one file in both, the same numbers, training, merging and files from both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from nbpeft.engine.registry import method_of
from nbpeft.errors import ConfigError
from nbpeft.model import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tests.tiny_models import llama, logits, same_state, state, tokens

SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "MiCA": {"init_lora_weights": "mica", "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
each = pytest.mark.parametrize("case", CASES)


def settings(case: str, **more: Any) -> dict[str, Any]:
    return {**SETTINGS, "task_type": "CAUSAL_LM", **CASES[case], **more}


def adapted(case: str, **more: Any) -> PeftModel:
    return get_peft_model(llama(), LoraConfig(**settings(case, **more)))


def move(model: Any) -> None:
    """Moves what is trained off its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def from_one_file(case: str, folder: Path, **more: Any) -> tuple[Any, PeftModel]:
    """PEFT's model and ours with an adapter that PEFT has saved, both to be trained."""
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings(case, **more)))
    move(theirs)
    theirs.save_pretrained(folder)
    return theirs.eval(), PeftModel.from_pretrained(llama(), folder, is_trainable=True).eval()


def train(model: Any, steps: int = 8) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    losses = []
    for step in range(steps):
        batch = tokens(3, 11, seed=step % 4)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@each
def test_equal_to_peft_in_calls_training_and_files(case: str, tmp_path: Path) -> None:
    theirs, ours = from_one_file(case, tmp_path / "theirs")
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert trained(ours).keys() == trained(theirs).keys()
    assert train(ours) == pytest.approx(train(theirs), abs=1e-3)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert torch.allclose(logits(back), logits(ours), atol=1e-5)
    written, given = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    changed = {name for name in given if written[name] != given[name]} - {"peft_version", "target_modules"}
    assert changed <= {"inference_mode"}


@each
def test_equal_to_peft_merged_and_unmerged(case: str, tmp_path: Path) -> None:
    theirs, ours = from_one_file(case, tmp_path)
    before, expected = state(ours), logits(ours)
    ours.merge_adapter()
    theirs.merge_adapter()
    assert torch.allclose(logits(ours), expected, atol=1e-5)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    ours.unmerge_adapter()
    assert same_state(before, state(ours))
    assert torch.equal(logits(ours), expected)


@each
def test_equal_to_peft_at_the_start(case: str) -> None:
    base = llama()
    before = state(base)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings(case))).eval()
    ours = get_peft_model(base, LoraConfig(**settings(case))).eval()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert method_of(ours.peft_config["default"]).label == case.split()[0]
    own, given = get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in given.items()}
    assert same_state(before, state(ours.unload()))


@each
def test_one_beside_another_adapter(case: str) -> None:
    model = adapted(case).eval()
    move(model)
    alone = logits(model)
    model.add_adapter("plain", LoraConfig(**SETTINGS, init_lora_weights=False))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), alone)
    model.delete_adapter("plain")
    assert torch.equal(logits(model), alone)


# MiCA


def test_mica_trains_the_first_factor_alone() -> None:
    model = adapted("MiCA")
    start = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    assert model.get_nb_trainable_parameters()[0] == sum(value.numel() for key, value in start.items() if "_A" in key)
    train(model, steps=2)
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, start[key]) == ("_A" not in key), key


def test_mica_stays_frozen_whatever_is_done_to_the_adapter() -> None:
    model = adapted("MiCA")
    fixed = [one for name, one in model.named_parameters() if "lora_B" in name or "embedding_B" in name]
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    for act in (
        lambda: model.set_adapter("default"),
        lambda: model.set_requires_grad("default", True),
        lambda: layer.set_adapter("default"),
        lambda: layer.set_requires_grad("default", True),
        lambda: (model.manager.freeze("default"), model.manager.unfreeze("default")),
        lambda: layer.update_layer("default", 4, 8, model.peft_config["default"]),
        lambda: copy.deepcopy(model),
    ):
        act()
        assert fixed and not any(one.requires_grad for one in fixed)
        assert layer.lora_A["default"].weight.requires_grad
    assert not layer.lora_B["default"].weight.requires_grad


def test_mica_is_a_lora_for_those_that_serve_it() -> None:
    model = adapted("MiCA")
    move(model)
    model.add_weighted_adapter(["default"], [1.0], "plain", combination_type="linear")
    assert method_of(model.peft_config["plain"]).label == "LoRA"
    expected = logits(model)
    model.set_adapter("plain")
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"init_lora_weights": "mica", "use_dora": True}, "use_dora cannot be combined with mica"),
        ({"init_lora_weights": "mica", "lora_bias": True}, "lora_bias=True is supported with"),
    ],
)
def test_what_a_variant_cannot_do_is_refused_in_one_line(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as failure:
        get_peft_model(llama(), LoraConfig(**{**SETTINGS, **more}))
    assert "\n" not in str(failure.value)
