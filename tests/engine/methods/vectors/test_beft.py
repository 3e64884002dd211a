"""BEFT: biases that are merged into biases, and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING as DEFAULTS
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import nbpeft
from nbpeft.engine.config.targets import usual_model_types
from nbpeft.engine.contract.registry import methods
from nbpeft.errors import MergeError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close, differ
from tests.tiny_models import llama, logits, randomize


def opt() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32)).eval()


def test_the_default_targets_are_those_of_peft() -> None:
    targets = next(method for method in methods() if method.label == "BEFT").default_targets
    for kind in {*usual_model_types(), *DEFAULTS, "nothing"}:
        assert targets(kind) == DEFAULTS.get(kind), kind


def test_merged_biases_are_those_of_peft(tmp_path: Path) -> None:
    model = get_peft_model(opt(), nbpeft.BeftConfig())
    randomize(model, scale=0.5)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(opt(), tmp_path).merge_and_unload()
    ours = model.merge_and_unload()
    assert_close(logits(ours), expected)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    changed = [name for name, tensor in opt().state_dict().items() if not torch.equal(tensor, ours.state_dict()[name])]
    assert changed == [f"model.decoder.layers.{layer}.self_attn.v_proj.bias" for layer in range(2)]


def test_without_a_bias_in_the_base_it_learns_and_is_not_merged() -> None:
    with pytest.warns(UserWarning, match=r"down_proj \(and 1 more\) has no bias in the base: the adapter cannot be"):
        model = get_peft_model(llama(), nbpeft.BeftConfig(target_modules=["v_proj", "down_proj"]))
    randomize(model, scale=0.5)
    expected = logits(model.eval())
    assert differ(expected, logits(llama()))
    with pytest.raises(MergeError, match="adds a bias, but the base layer has no bias"):
        model.merge_adapter()
    config, tensors = nbpeft.convert_to_lora(model, rank=1)
    assert config.lora_bias and config.r == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = get_peft_model(llama(), config)
    nbpeft.set_peft_model_state_dict(lora, tensors)
    assert_close(logits(lora.eval()), expected)


def quantized(kind: str) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=True, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.float32, quant_type=kind)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    return nn.ModuleDict({"target": layer.to("cpu")})


def stored(model: Any) -> list[Tensor]:
    layer = model.base_model.model["target"]
    weight = [tensor for tensor in layer.backend.tensors(layer.base_layer) if tensor is not layer.base_layer.bias]
    return [tensor.detach().clone() for tensor in weight]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_quantized_weight_is_not_rounded_again(kind: str) -> None:
    model: PeftModel = get_peft_model(quantized(kind), nbpeft.BeftConfig(target_modules=["target"]))
    randomize(model, scale=0.5)
    layer: Any = model.base_model.model["target"]  # type: ignore[index]
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected, before, bias = layer(x), stored(model), layer.base_layer.bias.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.merge_adapter()
        assert all(torch.equal(*pair) for pair in zip(before, stored(model), strict=True))
        assert_close(layer(x), expected)
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.bias, bias)
