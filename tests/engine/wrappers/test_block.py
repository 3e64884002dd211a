"""Blocks that a side network changes have PEFT's wrapper: its names, attributes and commands."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.engine.wrappers.block import AdaptedBlock
from nbpeft.errors import AdapterError, ConfigError, NbpeftError, TargetError
from tests.closeness import assert_close, differ
from tests.tiny_models import gpt2, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore")


def shadowed(library: Any = nbpeft, base: Any = None, **fields: Any) -> Any:
    torch.manual_seed(1)
    config = library.ShadowConfig(task_type="CAUSAL_LM", init_weights=False, shadow_alpha=1.0, **fields)
    return library.get_peft_model(llama() if base is None else base, config).eval()


def block_of(model: Any, number: int = 0) -> Any:
    return model.get_base_model().model.layers[number]


def test_the_attributes_of_a_block_are_those_of_peft() -> None:
    found = []
    for library in (nbpeft, peft):
        base = llama()
        base.model.layers[1].kind_of_attention = "full"
        model = shadowed(library, base)
        model.add_adapter("other", library.ShadowConfig(task_type="CAUSAL_LM", r=3, shadow_dropout=0.0))
        block = block_of(model, 1)
        assert isinstance(block, model.base_model.tuner_layer_cls) and not isinstance(block.base_layer, type(block))
        names = ("adapter_layer_names", "active_adapters", "disable_adapters", "merged", "kind_of_attention")
        found.append(
            (
                [sorted(value) if isinstance(value := getattr(block, name), tuple) else value for name in names],
                *(dict(getattr(block, name)) for name in ("shadow_r", "shadow_alpha")),
                [[*map(str, getattr(block, name).values())] for name in sorted(block.adapter_layer_names)],
                repr(block),
                type(block.get_base_layer()),
                block._get_available_adapters(),
            )
        )
        assert not hasattr(block, "_not_there") and not hasattr(block, "not_there")
    assert found[0] == found[1]


def test_commands_on_a_block_are_those_of_its_adapter() -> None:
    model = shadowed()
    wanted, plain = logits(model), logits(llama())
    for block in (block_of(model, 0), block_of(model, 1)):
        block.enable_adapters(False)
    assert torch.equal(logits(model), plain)
    block_of(model).enable_adapters(True)
    assert torch.equal(logits(model), wanted) and block_of(model).shadow_up["default"].weight.requires_grad


def test_a_module_put_into_a_block_computes_in_it() -> None:
    model = shadowed()
    before = logits(model)
    doubled = nn.Linear(8, 32, bias=False)
    doubled.weight.data = 2 * block_of(model).shadow_up["default"].weight.detach()
    block_of(model).shadow_up["default"] = doubled
    changed = logits(model)
    assert differ(changed, before)
    calls: list[int] = []
    block_of(model, 1).shadow_dropout["default"].register_forward_hook(lambda *given: calls.append(1))
    assert torch.equal(logits(model), changed) and calls == [1]
    with pytest.raises(AdapterError, match="no adapter 'more' with this module"):
        block_of(model).shadow_up["more"] = nn.Linear(8, 32)
    with pytest.raises(AdapterError, match=r"delete_adapter\(\) removes the adapter"):
        del block_of(model).shadow_up["default"]
    model.load_state_dict(shadowed(peft).state_dict())
    assert_close(logits(model), before)


def test_blocks_are_wrapped_as_long_as_an_adapter_is_there() -> None:
    model = shadowed()
    model.add_adapter("other", nbpeft.ShadowConfig(task_type="CAUSAL_LM", target_modules=["model.layers.0"]))
    wrapped = [name for name, module in model.named_modules() if isinstance(module, AdaptedBlock)]
    assert wrapped == ["base_model.model.model.layers.0", "base_model.model.model.layers.1"]
    model.delete_adapter("default")
    assert [*block_of(model, 0).shadow_up] == ["other"] and [*block_of(model, 1).shadow_up] == []
    base = model.unload()
    assert not any(isinstance(module, AdaptedBlock) for module in base.modules())
    assert [*base.state_dict()] == [*llama().state_dict()]


def test_layers_inside_a_block_have_their_paths() -> None:
    model = shadowed()
    alone = logits(model)
    model.add_adapter("lora", nbpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert model.manager.layers.keys() >= {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
    model.base_model.set_adapter(["default", "lora"])
    assert differ(logits(model), alone)
    name = "base_model.model.model.layers.1.base_layer.self_attn.q_proj.lora_A.lora.weight"
    assert name in model.state_dict() and nbpeft.get_base_model_state_dict(model).keys() == llama().state_dict().keys()


def test_beside_a_learned_prompt_the_network_is_below_the_embedding() -> None:
    prompt = nbpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = nbpeft.get_peft_model(llama(), prompt)
    model.add_adapter("beside", nbpeft.ShadowConfig(task_type="CAUSAL_LM"))
    names = [name for name, _ in model.named_parameters()]
    assert "base_model.model.embed_tokens.shadow_networks.beside.shadow_backbone.norm.weight" in names
    assert "base_model.model.layers.1.shadow_up.beside.weight" in names
    first = shadowed()
    first.add_adapter("prompt", prompt)
    names = [name for name, _ in first.named_parameters()]
    assert "base_model.shadow_backbone.default.norm.weight" in names
    assert "base_model.model.model.embed_tokens.prompt_encoder.prompt.embedding.weight" in names


@pytest.mark.parametrize(
    ("config", "words", "error"),
    [
        (
            nbpeft.LoraConfig(target_modules=["lm_head"], modules_to_save=["layers.0"]),
            "the side network of an adapter changes model.layers.0",
            ConfigError,
        ),
        (nbpeft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2)]), "already has adapters", TargetError),
    ],
)
def test_a_wrapped_block_is_neither_copied_nor_repeated(config: Any, words: str, error: type[NbpeftError]) -> None:
    model = shadowed()
    before = logits(model)
    with pytest.raises(error, match=words):
        model.add_adapter("other", config)
    assert torch.equal(logits(model), before) and [*model.peft_config] == ["default"]


def test_the_blocks_of_another_architecture_are_wrapped_too() -> None:
    model = shadowed(base=gpt2())
    assert all(isinstance(block, AdaptedBlock) for block in model.get_base_model().transformer.h)
    assert model.get_layer_status()[1].name == "model.transformer.h.1"
