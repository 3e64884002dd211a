"""The helpers of peft that its users import."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft.helpers
import pytest
import torch
from transformers import LlamaForCausalLM

import nbpeft.model as nbpeft
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.model import rescale_adapter_scale
from tests.closeness import assert_close, differ
from tests.tiny_models import VOCABULARY, adapted, config, llama, logits

NAMES = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_peft(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (nbpeft, peft.helpers))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


def test_what_is_a_saved_adapter(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "adapter")
    assert nbpeft.check_if_peft_model(tmp_path / "adapter")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text('{"foo": "bar"}')
    for name in ("broken", "nothing"):
        assert not nbpeft.check_if_peft_model(tmp_path / name)


@pytest.mark.parametrize("use_dora", [False, True])
def test_scales_are_other_ones_inside_the_block_only(use_dora: bool) -> None:
    model, base = adapted(use_dora=use_dora), logits(llama())
    model.add_adapter("other", config(alpha_pattern={"q_proj": 3}))
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before, scalings = logits(model), layer.scaling.copy()
    with rescale_adapter_scale(model, 0.5):
        assert layer.scaling == {name: value / 2 for name, value in scalings.items()}
        halved = logits(model)
        with rescale_adapter_scale(model, 2):
            assert_close(logits(model), before)
    assert differ(halved, before) and torch.equal(logits(model), before)
    assert layer.scaling == scalings
    if not use_dora:
        with rescale_adapter_scale(model.get_base_model(), 0.0):
            assert torch.equal(logits(model), base)


def test_scalings_read_before_and_in_the_block_keep_their_values() -> None:
    model = adapted()
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before = layer.scaling
    value = before["default"]
    with rescale_adapter_scale(model, 0.5):
        inside = layer.scaling
        assert (before, inside) == ({"default": value}, {"default": value / 2})
    assert (before, inside, layer.scaling) == ({"default": value}, {"default": value / 2}, {"default": value})
    layer.scaling["default"] = 3.0
    assert layer.scaling == {"default": 3.0} and before == {"default": value}


def test_adapters_renamed_or_deleted_inside_get_their_scales_back() -> None:
    model = adapted()
    model.add_adapter("gone", config())
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before, scaling = logits(model), layer.scaling["default"]
    with rescale_adapter_scale(model, 3):
        model.delete_adapter("gone")
        model.manager.rename("default", "new")
        assert layer.scaling == {"new": 3 * scaling}
    assert layer.scaling == {"new": scaling} and torch.equal(logits(model), before)


def test_an_error_inside_the_block_brings_the_scales_back() -> None:
    model = adapted()
    before = logits(model)
    with pytest.raises(KeyError), rescale_adapter_scale(model, 3):
        raise KeyError
    assert torch.equal(logits(model), before)
    with (
        pytest.raises(TypeError, match="Argument multiplier should be of type float"),
        rescale_adapter_scale(model, "a"),
    ):  # type: ignore[arg-type]
        pass
    with (
        pytest.raises(AdapterError, match="scaling is only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(llama(), 2),
    ):
        pass


def test_what_is_merged_inside_the_block_stays() -> None:
    model = adapted()
    with rescale_adapter_scale(model, 0.25):
        expected = logits(model)
        merged = model.merge_and_unload()
    assert_close(logits(merged), expected)


def test_weights_that_hooks_cast_need_no_help() -> None:
    model = adapted().half()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    for module in layer.modules():
        module.register_forward_pre_hook(lambda module, args: module.float() and None)
    with nbpeft.disable_input_dtype_casting(model):
        assert layer(torch.ones(1, 32)).dtype == torch.float32


def test_signatures_of_the_base_are_shown() -> None:
    model = adapted()
    nbpeft.update_signature(model)
    assert model.forward.__doc__ == LlamaForCausalLM.forward.__doc__
    assert list(inspect.signature(model.forward).parameters)[:2] == ["input_ids", "attention_mask"]
    assert model.generate.__doc__ == LlamaForCausalLM.generate.__doc__
    assert logits(model).shape == (2, 9, VOCABULARY)
    assert model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False).shape == (1, 5)
    with pytest.raises(ConfigError, match="Did you mean 'forward'"):
        nbpeft.update_signature(model, "foward")
    named = adapted(task_type="CAUSAL_LM")
    nbpeft.update_forward_signature(named)
    assert "forward" not in named.__dict__
