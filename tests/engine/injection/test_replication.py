"""``layer_replication``: layers used several times, each time with factors of their own, as in PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    FalconModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import nbpeft
from nbpeft.errors import ConfigError, TargetError
from tests.closeness import assert_close, differ
from tests.tiny_models import llama, same_state, state, tokens

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 97,
}
MAP = [[0, 2], [1, 3]]
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (lambda: llama(num_hidden_layers=3), ["q_proj", "down_proj"]),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2)), ["q_proj", "v_proj"]),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SMALL)), ["query", "value"]),
    "falcon": (lambda: FalconModel(FalconConfig(**SMALL)), ["query_key_value"]),
}


def base(kind: str) -> Any:
    torch.manual_seed(0)
    return MODELS[kind][0]().eval()


def fields(kind: str, **changes: Any) -> dict[str, Any]:
    settings = {"target_modules": MODELS[kind][1], "layer_replication": MAP, "r": 4, "init_lora_weights": False}
    return settings | changes


def adapted(kind: str = "llama", **changes: Any) -> Any:
    return nbpeft.get_peft_model(base(kind), nbpeft.LoraConfig(**fields(kind, **changes))).eval()


def output(model: Any) -> Tensor:
    found: Tensor = model(input_ids=tokens())[0].detach()
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_files_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(base(kind), peft.LoraConfig(**fields(kind))).eval()
    ours = adapted(kind)
    expected = dict(peft.get_peft_model_state_dict(theirs))
    assert nbpeft.get_peft_model_state_dict(ours).keys() == expected.keys()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    nbpeft.set_peft_model_state_dict(ours, expected)
    assert_close(output(ours), output(theirs))
    assert differ(output(ours), output(base(kind)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in ("theirs", "ours"):
            loaded = nbpeft.PeftModel.from_pretrained(base(kind), str(tmp_path / source)).eval()
            assert_close(output(loaded), output(theirs))
    assert_close(output(peft.PeftModel.from_pretrained(base(kind), str(tmp_path / "ours")).eval()), output(ours))


@pytest.mark.parametrize("kind", MODELS)
def test_unloading_puts_the_layers_back_and_merging_keeps_them(kind: str) -> None:
    ours = adapted(kind)
    before, expected = state(ours), output(ours)
    merged = copy.deepcopy(ours).merge_and_unload()
    assert merged.config.num_hidden_layers == 4
    assert_close(output(merged), expected)
    ours.merge_adapter()
    assert_close(output(ours), expected)
    ours.unmerge_adapter()
    assert same_state(before, state(ours))
    plain = ours.unload()
    assert plain.config.num_hidden_layers == 3 and same_state(state(plain), state(base(kind)))
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert torch.equal(output(plain), output(base(kind)))


def test_replicas_cost_no_memory_and_learn_apart() -> None:
    ours, plain = adapted(init_lora_weights=True).train(), base("llama")
    frozen = sum(p.numel() for p in ours.parameters() if not p.requires_grad)
    assert frozen == sum(p.numel() for p in plain.parameters())
    first, again = (ours.base_model.model.model.layers[index] for index in (1, 2))
    assert (
        first.mlp.up_proj.weight is again.mlp.up_proj.weight and first.self_attn.layer_idx != again.self_attn.layer_idx
    )
    assert first.self_attn.config is ours.base_model.model.config
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        ours(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert not torch.equal(*(layer.self_attn.q_proj.lora_B["default"].weight for layer in (first, again)))
    assert not ours.base_model.model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_a_cache_knows_the_new_layers() -> None:
    theirs = peft.get_peft_model(base("llama"), peft.LoraConfig(**fields("llama"))).eval()
    ours = adapted()
    nbpeft.set_peft_model_state_dict(ours, dict(peft.get_peft_model_state_dict(theirs)))
    call = {"input_ids": tokens(), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**call), theirs.generate(**call))
    assert torch.equal(ours.generate(**call), ours.generate(**call, use_cache=False))


def test_an_empty_range_adds_nothing_as_in_peft() -> None:
    settings = fields("llama", layer_replication=[[0, 2], [1, 1]])
    for library in (nbpeft, peft):
        model: Any = library.get_peft_model(base("llama"), library.LoraConfig(**settings))  # type: ignore[attr-defined]
        assert len(model.base_model.model.model.layers) == 2


def test_settings_of_each_layer_follow() -> None:
    """PEFT leaves the list of the kinds of attention as long as it was."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, layer_types=kinds, use_sliding_window=True, sliding_window=4))
    ours = nbpeft.get_peft_model(model, nbpeft.LoraConfig(layer_replication=MAP))
    assert model.config.layer_types == [kinds[index] for index in (0, 1, 1, 2)]
    ours.unload()
    assert model.config.layer_types == kinds


def test_falcon_with_a_head_is_found_too() -> None:
    model = FalconForCausalLM(FalconConfig(**SMALL)).eval()
    settings = {"layer_replication": MAP, "target_modules": ["query_key_value"]}
    with pytest.raises(ValueError, match="Could not locate the layers"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    assert len(nbpeft.get_peft_model(model, nbpeft.LoraConfig(**settings)).base_model.model.transformer.h) == 4


def test_several_adapters_share_the_replicas() -> None:
    """PEFT replicates again for each adapter that says so."""
    ours = adapted()
    expected = output(ours)
    ours.add_adapter("same", nbpeft.LoraConfig(**fields("llama", r=2)))
    ours.add_adapter("plain", nbpeft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    assert ours.config.num_hidden_layers == 4
    assert_close(output(ours), expected)
    with pytest.raises(ConfigError, match=r"replicated as \[\(0, 2\), \(1, 3\)\] for its adapters"):
        ours.add_adapter("other", nbpeft.LoraConfig(**fields("llama", layer_replication=[[0, 3], [0, 3]])))
    for name in ("default", "same"):
        ours.delete_adapter(name)
    assert ours.config.num_hidden_layers == 4
    ours.delete_adapter("plain")
    assert same_state(state(ours.get_base_model()), state(base("llama")))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer_replication": [[0, 9]]}, ConfigError, r"\[\(0, 9\)\], but model.layers has the layers 0 to 2"),
        ({"layer_replication": [[0, 2, 3]]}, ConfigError, "must be pairs of whole numbers"),
        ({"bias": "all"}, ConfigError, "repeats biases, which bias='all' cannot train separately"),
        ({"target_modules": ["nowhere"]}, TargetError, "nowhere"),
        ({"r": 4, "rank_pattern": {"q_proj": 0}}, ConfigError, ""),
    ],
    ids=str,
)
def test_what_cannot_be_done_leaves_the_model_as_it_was(changes: Any, error: Any, message: str) -> None:
    model = base("llama")
    with pytest.raises(error, match=message) as failure:
        nbpeft.get_peft_model(model, nbpeft.LoraConfig(**fields("llama", **changes)))
    assert "\n" not in str(failure.value)
    assert model.config.num_hidden_layers == 3 and same_state(state(model), state(base("llama")))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_failure_while_it_is_put_on_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    model = base("llama")
    monkeypatch.setattr("nbpeft.engine.methods.lora.lora.LoRA.create", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        nbpeft.get_peft_model(model, nbpeft.LoraConfig(**fields("llama")))
    assert model.config.num_hidden_layers == 3 and len(model.model.layers) == 3
    assert same_state(state(model), state(base("llama"))) and all(p.requires_grad for p in model.parameters())


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(TargetError, match="Could not locate the layers attribute in the model, a Sequential"):
        nbpeft.get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), nbpeft.LoraConfig(target_modules=["0"], layer_replication=MAP)
        )
