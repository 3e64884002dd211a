"""LN tuning beside other methods, and on what is no norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import nbpeft
from nbpeft.errors import TargetError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import gpt2, llama, logits, randomize, tokens


def test_norms_take_no_other_method() -> None:
    model = get_peft_model(llama(), nbpeft.LNTuningConfig())
    with pytest.raises(TargetError, match="LlamaRMSNorm, which cannot be adapted"):
        model.add_adapter("lora", nbpeft.LoraConfig(target_modules=["norm"]))
    with pytest.raises(TargetError, match="Attention, which cannot be adapted by LN tuning"):
        model.add_adapter("ln", nbpeft.LNTuningConfig(target_modules=["self_attn"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "target_modules"),
    [(llama, ["q_proj", "down_proj", "norm"]), (llama, ["embed_tokens"]), (gpt2, ["c_attn", "ln_1", "wpe"])],
    ids=["linear", "embedding", "conv1d"],
)
def test_other_layers_are_trained_as_a_whole_as_in_peft(make: Any, target_modules: list[str], tmp_path: Path) -> None:
    ours = get_peft_model(make(), nbpeft.LNTuningConfig(target_modules=target_modules)).eval()
    assert torch.equal(logits(ours), logits(make()))
    randomize(ours, scale=0.1)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True).eval()
    assert {name for name, one in ours.named_parameters() if one.requires_grad} == {
        name for name, one in theirs.named_parameters() if one.requires_grad
    }
    assert_close(logits(ours), logits(theirs))
    for model in (ours, theirs):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = {name: one.grad for name, one in theirs.named_parameters() if one.requires_grad}
    for name, one in ours.named_parameters():
        if one.requires_grad:
            assert_close(one.grad, gradients[name])
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    assert torch.equal(logits(again), logits(ours))
    expected = logits(ours)
    assert_close(logits(ours.merge_and_unload()), expected)


def test_a_quantized_layer_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = llama()
    layer = model.model.layers[0].self_attn
    layer.q_proj = bnb.nn.Linear4bit(32, 32, quant_type="nf4").to("cpu")
    with pytest.raises(TargetError, match=r"q_proj cannot be adapted by LN tuning, .* quantized"):
        get_peft_model(model, nbpeft.LNTuningConfig(target_modules=["q_proj"]))


def test_the_norm_runs_once_and_its_own_weight_stays() -> None:
    model = get_peft_model(llama(), nbpeft.LNTuningConfig())
    randomize(model, scale=0.1)
    layer: Any = model.base_model.model.model.norm
    weight = layer.base_layer.weight.clone()
    calls = []
    layer.register_forward_hook(lambda *given: calls.append(given))
    changed = logits(model.eval())
    assert len(calls) == 1 and torch.equal(layer.base_layer.weight, weight)
    model.add_adapter("lora", nbpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])  # now as a difference that is added
    both = logits(model)
    model.merge_adapter()
    assert_close(logits(model), both)
    assert not torch.equal(both, changed)
