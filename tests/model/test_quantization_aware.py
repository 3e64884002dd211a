"""Training that knows the grid it will be rounded to, from the base's preparation to the merged model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nbpeft import OFTConfig
from nbpeft.errors import ConfigError, MergeError
from nbpeft.model import LoraConfig, PeftModel, get_peft_model, merge_calibrated
from nbpeft.model.quantization.quantize import quantize_model
from nbpeft.model.saving.merge_export import merge_to_folder
from nbpeft.training import prepare_model_for_kbit_training
from tests.tiny_models import llama, randomize, tokens

pytest.importorskip("bitsandbytes")
SETTINGS = {"target_modules": "all-linear", "r": 8, "lora_alpha": 16}


def base() -> Any:
    return quantize_model(llama(hidden_size=64, intermediate_size=128))


def loss_of(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def learned(aware: bool, steps: int = 60, rate: float = 1e-3) -> tuple[float, float]:
    """What training gains on a batch, and what is left of that after merging into 4 bits."""
    torch.manual_seed(0)
    model, ids = base(), tokens(4, 12, 0)
    before = loss_of(model, ids)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False, quantization_aware=aware)
    model = get_peft_model(model, LoraConfig(**SETTINGS)).train()
    optimizer = torch.optim.AdamW(model.manager.parameters("default"), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = loss_of(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if aware else "ignore")  # nothing is lost: nothing to warn of
        model.merge_adapter()
    return before - trained, before - loss_of(model, ids)


@pytest.mark.slow
def test_what_was_learned_is_left_after_merging_into_four_bits() -> None:
    gain, left = learned(aware=False)
    assert left < gain, "rounding takes some of it away"
    aware_gain, aware_left = learned(aware=True)
    assert aware_left == aware_gain >= 0.9 * gain


def test_a_prepared_base_makes_new_adapters_so_and_leaves_others(tmp_path: Path) -> None:
    plain = get_peft_model(base(), LoraConfig(**SETTINGS))
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_aware" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    model = prepare_model_for_kbit_training(base(), quantization_aware=True)
    with pytest.raises(ConfigError, match="OFTConfig does not support: use a LoraConfig"):
        get_peft_model(model, OFTConfig(target_modules=["q_proj"], oft_block_size=8))
    with pytest.raises(ConfigError, match="does not work with use_dora=True"):
        get_peft_model(model, LoraConfig(**SETTINGS, use_dora=True))
    adapted = get_peft_model(model, LoraConfig(**SETTINGS))
    adapted.load_adapter(tmp_path / "plain", "plain")
    assert adapted.peft_config["default"].quantization_aware and not adapted.peft_config["plain"].quantization_aware
    with pytest.raises(ConfigError, match="is for quantized models, and this LlamaForCausalLM is not one"):
        prepare_model_for_kbit_training(llama(), quantization_aware=True)


def test_a_loaded_adapter_acts_as_it_was_trained(tmp_path: Path) -> None:
    model, ids = get_peft_model(base(), LoraConfig(**SETTINGS, quantization_aware=True)), tokens()
    randomize(model, scale=0.1)
    model.save_pretrained(tmp_path / "aware")
    wanted = model.eval()(ids).logits
    again = PeftModel.from_pretrained(base(), tmp_path / "aware").eval()
    assert torch.equal(again(ids).logits, wanted)
    with pytest.raises(
        MergeError, match="'default' was trained with rounding to the nearest level: merge without rows"
    ):
        merge_calibrated(again, [{"input_ids": ids}])
    with pytest.warns(UserWarning, match="a full-precision copy gives other outputs"):
        merge_to_folder(again, None, tmp_path / "copy")
    merged = again.merge_and_unload()
    assert torch.equal(merged(ids).logits, wanted)
    with pytest.warns(UserWarning, match="trained for merging into quantized weights: .* none of the target layers"):
        PeftModel.from_pretrained(llama(hidden_size=64, intermediate_size=128), tmp_path / "aware")
