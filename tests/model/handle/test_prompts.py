"""A handle with a learned prompt does what one of PEFT does with the model's embeddings."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import nbpeft
from nbpeft import LoraConfig, PeftModel, get_peft_model
from nbpeft.errors import AdapterError
from tests.closeness import assert_close
from tests.tiny_models import VOCABULARY, adapted, llama, logits, randomize, same_state, state

PROMPTS: dict[str, dict[str, Any]] = {
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "MultitaskPromptTuningConfig": {"num_virtual_tokens": 3, "num_tasks": 2},
    "CPTConfig": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "CartridgeConfig": {"num_virtual_tokens": 3},
    "AdaptionPromptConfig": {"adapter_len": 3, "adapter_layers": 1},
}
IDS = torch.arange(8)[None]


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        tasks = {"task_ids": torch.tensor([1])} if model.peft_type == "MULTITASK_PROMPT_TUNING" else {}
        found: torch.Tensor = model(input_ids=IDS, **tasks).logits
    return found


@pytest.mark.parametrize("size", [VOCABULARY + 4, VOCABULARY - 7])
@pytest.mark.parametrize("name", PROMPTS)
def test_embeddings_under_a_prompt_are_resized_as_in_peft(name: str, size: int, tmp_path: Path) -> None:
    model = get_peft_model(llama(), getattr(nbpeft, name)(task_type="CAUSAL_LM", **PROMPTS[name]))
    randomize(model)
    before = output(model.eval())
    model.save_pretrained(tmp_path)
    oracle = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    for one in (model, oracle):
        torch.manual_seed(1)
        resized = one.resize_token_embeddings(size)
        assert type(resized) is nn.Embedding and resized.num_embeddings == len(resized.weight) == size
        assert one.get_base_model().config.vocab_size == size
    after, kept = output(model), min(size, VOCABULARY)
    assert_close(after[..., :kept], before[..., :kept])
    assert_close(after, output(oracle))
    assert model.manager.names == ("default",) and not model.manager.layers["model.embed_tokens"].weight.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_a_prompt_is_saved_and_read_again_after_its_embedding_was_resized(tied: bool, tmp_path: Path) -> None:
    def base() -> Any:
        return llama(tie_word_embeddings=tied)

    model = get_peft_model(base(), nbpeft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    randomize(model)
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCABULARY + 4)
    model.save_pretrained(tmp_path)
    larger = base()
    torch.manual_seed(1)
    larger.resize_token_embeddings(VOCABULARY + 4)
    again = PeftModel.from_pretrained(larger, tmp_path).eval()
    assert torch.equal(output(again), output(model))
    base_alone = model.unload()
    assert torch.equal(logits(base_alone, IDS), logits(again.unload(), IDS))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
    ],
)
def test_embeddings_with_adapters_of_their_own_are_not_resized(changes: dict[str, Any]) -> None:
    model = adapted(**changes)
    expected, before = logits(model), state(model)
    with pytest.raises(AdapterError, match=r"the vocabulary's size: call resize_token_embeddings\(\) before"):
        model.resize_token_embeddings(VOCABULARY + 4)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(before[key], value) for key, value in state(model).items())
    model.resize_token_embeddings(VOCABULARY)  # as they are
    assert torch.equal(logits(model), expected)


def test_a_tied_head_with_an_adapter_is_not_resized() -> None:
    model = adapted(llama(tie_word_embeddings=True), target_modules=["lm_head"])
    base, before = model.get_base_model(), state(model)
    with pytest.raises(AdapterError, match="the vocabulary's size"):
        model.resize_token_embeddings(VOCABULARY + 4)
    assert same_state(state(model), before)
    assert base.lm_head.base_layer.weight is base.get_input_embeddings().weight
    assert base.config.vocab_size == base.vocab_size == VOCABULARY


def test_a_model_of_layers_alone_has_no_embeddings_to_resize() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'resize_token_embeddings'"):
        model.resize_token_embeddings(8)


def test_embeddings_without_adapters_are_resized_as_they_are() -> None:
    model = adapted()
    expected = logits(model)
    model.resize_token_embeddings(VOCABULARY + 4)
    assert_close(logits(model)[..., :VOCABULARY], expected)


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_prompt_stays_when_its_embedding_is_replaced(name: str, copied: Any) -> None:
    config = getattr(nbpeft, name)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config).eval()
    randomize(model)
    model = copied(model) if copied else model
    base: Any = model.get_base_model()
    new = nn.Embedding.from_pretrained(torch.randn(VOCABULARY, 32))
    base.set_input_embeddings(new)
    before = logits(model)
    assert model.word_embeddings is new and [*model.peft_config] == ["default"]
    fresh = llama()
    fresh.set_input_embeddings(new)
    again = get_peft_model(fresh, config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), before)
    base.set_input_embeddings(nn.Embedding(VOCABULARY, 16))
    assert not model.peft_config, "a prompt does not fit there"


@pytest.mark.parametrize("beside", [False, True])
def test_a_prompt_moves_to_a_new_embedding_before_the_first_call(beside: bool) -> None:
    prompt = nbpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), prompt)
    base: Any = model.get_base_model()
    if beside:
        model.add_adapter("other", nbpeft.LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
        model.delete_adapter("other")
        assert set(base.state_dict()) == set(llama().state_dict())
    base.set_input_embeddings(nn.Embedding(VOCABULARY, 32))
    assert [*model.peft_config] == ["default"]


def test_the_base_keeps_its_own_embedding() -> None:
    bare = llama()
    embedding = bare.get_input_embeddings()
    model = get_peft_model(bare, nbpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert bare.get_input_embeddings() is embedding is model.word_embeddings is model.get_input_embeddings()
    assert set(bare.state_dict()) == set(llama().state_dict())
    bare.set_input_embeddings(embedding)
    assert [*model.peft_config] == ["default"]
    model.unload()
    assert torch.equal(logits(bare), logits(llama()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_the_base_resizes_and_ties_its_embeddings_by_its_own_commands(name: str, tied: bool) -> None:
    def made(library: Any) -> tuple[Any, Any]:
        base = llama(tie_word_embeddings=tied)
        config = getattr(library, name)(num_virtual_tokens=3, task_type="CAUSAL_LM")
        return base, library.get_peft_model(base, config).eval()

    base, model = made(nbpeft)
    randomize(model)
    before = output(model)
    bases = base, made(peft)[0]
    for one in bases:
        torch.manual_seed(1)
        resized = one.resize_token_embeddings(VOCABULARY + 4)
        one.tie_weights()
        assert resized is one.get_input_embeddings() and type(resized) is nn.Embedding
        assert (one.lm_head.weight is resized.weight) == tied
    assert same_state(*({key: value.clone() for key, value in one.state_dict().items()} for one in bases))
    assert_close(output(model)[..., :VOCABULARY], before)
    assert model.word_embeddings is base.get_input_embeddings()
    with torch.no_grad():
        assert base(input_ids=IDS + VOCABULARY - 4).logits.shape[-1] == VOCABULARY + 4


T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize("parts", [None, 1, 2])
@pytest.mark.parametrize("name", ["PromptTuningConfig", "PromptEncoderConfig", "MultitaskPromptTuningConfig"])
def test_get_prompt_has_the_tokens_of_encoder_and_decoder_as_in_peft(name: str, parts: int | None) -> None:
    settings = {**PROMPTS[name], "task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": parts}
    tasks = {"task_ids": torch.tensor([0, 1])} if name.startswith("Multitask") else {}
    found: list[torch.Tensor] = []
    for library in (peft, nbpeft):
        torch.manual_seed(0)
        base = T5ForConditionalGeneration(T5Config(**T5))
        model = library.get_peft_model(base, getattr(library, name)(**settings))
        found.append(model.get_prompt(2, **tasks))
    assert found[1].shape[1] == PROMPTS[name]["num_virtual_tokens"] * (parts or 2)
    assert_close(found[1], found[0])
