"""LoftQ: a quantized base and factors that make up for what that lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft.utils import loftq_utils
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nbpeft
from nbpeft import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from nbpeft.engine.methods.lora.initialization.loftq import loftq_start, nearest_product, normal_float, quantize
from nbpeft.errors import AdapterError, ConfigError
from tests.closeness import assert_close
from tests.tiny_models import same_state, state


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.emb = nn.Embedding(50, 64)
        self.lin = nn.Linear(64, 96)
        self.turn = Conv1D(48, 96)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.turn(self.lin(self.emb(ids)).tanh())
        return out


IDS = torch.arange(50).view(2, 25)


def config(bits: int = 4, iterations: int = 1, **more: Any) -> LoraConfig:
    settings = {"r": 8, "lora_alpha": 24, "target_modules": ["emb", "lin", "turn"], **more}
    return LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(bits, iterations), **settings)


def error(model: nn.Module, base: bool = False) -> float:
    with torch.no_grad():
        expected = Tiny()(IDS)
        if not base:
            return float((model(IDS) - expected).square().mean())
        with model.disable_adapter():  # type: ignore[operator]
            return float((model(IDS) - expected).square().mean())


def test_the_numbers_are_those_of_bitsandbytes() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    codes, constants = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert_close(torch.tensor(normal_float(4)), constants.code)
    expected = bnb.functional.dequantize_4bit(codes, constants)
    assert_close(quantize(weight, 4).dequantize(), expected)
    rows, largest, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    expected = bnb.functional.int8_vectorwise_dequant(rows, largest)
    assert_close(quantize(weight.half(), 8).dequantize(), expected)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_nearest_product_is_that_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    lora_A, lora_B = nearest_product(matrix, 5)
    theirs = loftq_utils._low_rank_decomposition(matrix, 5)
    assert_close(lora_B @ lora_A, theirs["L"] @ theirs["R"])
    assert_close(lora_A.norm(dim=1), theirs["R"].norm(dim=1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_more_iterations_are_never_worse(bits: int) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for iterations in (1, 5):
        quantized, factors = loftq_start(weight, lambda value: value, 8, bits=bits, iterations=iterations)
        assert factors is not None
        errors.append(float((weight - quantized.dequantize() - factors[1] @ factors[0]).norm()))
    plain = float((weight - quantize(weight, bits).dequantize()).norm())
    assert errors[1] <= errors[0] < 0.95 * plain


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_an_adapter_makes_up_for_the_quantized_base(bits: int, more: dict[str, Any]) -> None:
    base = Tiny()
    model = get_peft_model(base, config(bits, **more))
    assert error(model) < 0.8 * error(model, base=True)
    weight = Tiny().turn.weight
    stored = base.turn.base_layer.weight
    assert_close(stored, quantize(weight, bits).dequantize())
    model.merge_adapter()
    merged = error(model)
    model.unmerge_adapter()
    assert_close(merged, error(model))


def test_it_comes_back_on_the_original_base_and_on_the_quantized_one(tmp_path: Path) -> None:
    model = get_peft_model(Tiny(), config(4, 2))
    expected = model(IDS)
    model.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(Tiny(), tmp_path)(IDS), expected)
    quantized = copy.deepcopy(model).unload()
    assert_close(PeftModel.from_pretrained(quantized, tmp_path)(IDS), expected)


def test_what_fails_leaves_the_weights_as_they_were() -> None:
    base = Tiny()
    before = state(base)
    with pytest.raises(ConfigError, match="at most 50 there, not 64"):
        get_peft_model(base, config(r=64))
    with pytest.raises(ConfigError, match="lora_ga_config must be provided"):
        get_peft_model(base, LoraConfig(init_lora_weights="lora_ga", target_modules=["lin"]))
    assert same_state(before, state(base))
    quantized = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    with pytest.raises(ConfigError, match="quantized already: add the adapter with init_lora_weights=True and call"):
        get_peft_model(quantized, config(target_modules=["0"]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loftq_config": {"loftq_bits": 3}}, "loftq_bits must be one of 2, 4, 8, not 3"),
        ({"loftq_config": {"loftq_iter": 0}}, "loftq_iter must be a positive whole number"),
        ({"loftq_config": {"bits": 4}}, "loftq_config has no field 'bits'; it has loftq_bits, loftq_iter"),
        ({"loftq_config": 4}, "loftq_config must be a LoftQConfig or a dictionary, not 4"),
        ({}, "`loftq_config` must be specified"),
    ],
)
def test_settings_are_checked(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(init_lora_weights="loftq", **more)


def test_settings_without_the_init_are_reported() -> None:
    with pytest.warns(UserWarning, match="`loftq_config` specified but will be ignored"):
        assert LoraConfig(loftq_config=LoftQConfig()).loftq_config == {}


def test_it_cannot_be_written_as_plain_lora(tmp_path: Path) -> None:
    model = get_peft_model(Tiny(), config())
    with pytest.raises(AdapterError, match="LoftQ replaced the base's weights"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    assert nbpeft.LoftQConfig is LoftQConfig
