"""``replace_lora_weights_loftq``: adapters on a quantized model, from the folder of the full-precision one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nbpeft import LoraConfig, PeftModel, get_peft_model, load_quantized, replace_lora_weights_loftq
from nbpeft.errors import AdapterError, CheckpointError, CheckpointNotFoundError
from nbpeft.model import get_peft_model_state_dict

IDS = torch.arange(24).view(2, 12)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:MatMul8bitLt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, num_key_value_heads=4, **shape))
    place = tmp_path_factory.mktemp("base")
    model.save_pretrained(place)
    yield place


def adapted(folder: Path, **more: Any) -> PeftModel:
    base = load_quantized(str(folder), quant_type="nf4", compute_dtype="float32")
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", **more)).eval()


@torch.no_grad()
def error(model: nn.Module, folder: Path) -> float:
    expected = LlamaForCausalLM.from_pretrained(folder).eval()(IDS).logits
    return float((model(IDS).logits - expected).square().mean())


@pytest.mark.parametrize("more", [{}, {"use_dora": True}])
def test_the_model_is_nearer_to_the_full_precision_one(folder: Path, more: dict[str, Any]) -> None:
    model = adapted(folder, **more)
    before = error(model, folder)
    replace_lora_weights_loftq(model)  # where the model is from
    assert error(model, folder) < 0.75 * before


def test_a_callback_says_which_layers_keep_it(folder: Path) -> None:
    model = adapted(folder)
    before = copy.deepcopy(get_peft_model_state_dict(model))
    seen: list[str] = []

    def keep(given: nn.Module, path: str) -> bool:
        assert given is model
        seen.append(path)
        return path.endswith("q_proj")

    replace_lora_weights_loftq(model, str(folder / "model.safetensors"), callback=keep)
    assert len(seen) == 14
    changed = {key for key, value in get_peft_model_state_dict(model).items() if not torch.equal(value, before[key])}
    assert changed and all(".q_proj." in key for key in changed)


def test_what_fails_leaves_the_adapter_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    before = copy.deepcopy(get_peft_model_state_dict(model))

    def fail(given: nn.Module, path: str) -> bool:
        raise RuntimeError(path)

    with pytest.raises(RuntimeError, match="q_proj"):
        replace_lora_weights_loftq(model, folder, callback=fail)
    with pytest.raises(CheckpointNotFoundError, match="neither a folder"):
        replace_lora_weights_loftq(model, tmp_path / "none")
    with pytest.raises(CheckpointNotFoundError, match=r"contains neither model\.safetensors"):
        replace_lora_weights_loftq(model, tmp_path)
    model.manager.model.config._name_or_path = "some/model"
    with pytest.raises(CheckpointError, match="give model_path"):
        replace_lora_weights_loftq(model)
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(AdapterError, match="has no quantized layer"):
        replace_lora_weights_loftq(get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])))
