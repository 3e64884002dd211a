"""Keys and values that start as a text's, and cartridges put together: as in peft, and right where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.cartridge import utils as theirs
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

import nbpeft
from nbpeft.errors import AdapterError, CheckpointError, ConfigError, NbpeftError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close, differ
from tests.tiny_models import adapted, gpt2, llama, randomize, same_state, state, tokens

TEXT = "a b c d e f g h a b"
TEMPLATE = "{% for m in messages %}{{ 'h g ' + m['content'] }}{% endfor %}"


def tokenizer(template: str | None = None) -> Any:
    words = {word: number for number, word in enumerate(["<unk>", *"abcdefgh"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", chat_template=template)


def with_cartridge(base: Any, module: Any = nbpeft, count: int = 10, **fields: Any) -> Any:
    settings = {"num_virtual_tokens": count, "task_type": "CAUSAL_LM", **fields}
    return module.get_peft_model(base, module.CartridgeConfig(**settings))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def test_a_cartridge_of_a_text_is_the_text_in_front_of_the_input() -> None:
    model = with_cartridge(llama())
    ids, question = tokenizer()(TEXT, return_tensors="pt")["input_ids"], tokens(1)
    expected = logits(llama(), torch.cat([ids, question], 1))[:, 10:]
    assert differ(logits(model, question), expected)
    written = nbpeft.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT)
    assert_close(logits(model, question), expected)
    assert torch.equal(written, model.get_prompt_embedding_to_save("default"))
    assert [tuple(one.shape) for one in model.parameters() if one.requires_grad] == [(9, 64)]


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("base", [llama, gpt2], ids=["llama", "gpt2"])
def test_what_a_text_gives_is_what_peft_takes(base: Any, template: str | None) -> None:
    models = [with_cartridge(base(), module, count=4) for module in (nbpeft, peft)]
    arguments: dict[str, Any] = {"text": TEXT, "max_length": 6}
    found = nbpeft.initialize_kv_prefix_from_text(models[0], tokenizer(template), **arguments)
    expected = theirs.initialize_kv_prefix_from_text(models[1], tokenizer(template), **arguments)
    assert_close(found, expected)
    assert_close(*(logits(model.eval(), tokens()) for model in models))
    if template:
        plain = nbpeft.initialize_kv_prefix_from_text(
            models[0], tokenizer(template), **arguments, use_chat_template=False
        )
        assert differ(plain, found)


def test_prefix_tuning_starts_as_a_cache_too() -> None:
    cache = llama()(input_ids=tokens(1), use_cache=True).past_key_values
    model = get_peft_model(llama(), nbpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    rows = nbpeft.initialize_kv_prefix_from_past_key_values(model, adapter_name="default", past_key_values=cache)
    assert_close(rows, theirs.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=5))
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, rows)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    assert torch.equal(nbpeft.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=5), rows)
    model.prompt_encoder["default"].load_prompt_embeddings(rows * 2)
    assert torch.equal(model.get_prompt_embedding_to_save("default"), rows * 2)


def test_dropout_and_windows_do_not_change_what_a_text_gives() -> None:
    """PEFT reads the text in the mode that the model is in, and takes what a window has kept: the end of the text."""

    def windowed() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, "attention_dropout": 0.5}
        return MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()

    ids = tokenizer()(TEXT, return_tensors="pt")["input_ids"][:, :3]
    cache = windowed()(input_ids=ids, use_cache=True).past_key_values
    expected = nbpeft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=3)
    model = with_cartridge(windowed(), count=3).train()
    found = nbpeft.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT)
    assert_close(found, expected)
    assert model.training and all(module.training for module in model.modules())
    of_peft = with_cartridge(windowed(), peft, count=3).eval()
    wrong = theirs.initialize_kv_prefix_from_text(of_peft, tokenizer(), text=TEXT)
    assert differ(wrong, expected)


def saved(folder: Path, module: Any = nbpeft, **fields: Any) -> Tensor:
    model = with_cartridge(llama(), module, **fields)
    model.save_pretrained(folder)
    found: Tensor = model.get_prompt_embedding_to_save("default")
    return found


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_cartridges_are_put_together_as_by_peft(safe: bool, tmp_path: Path) -> None:
    paths = [tmp_path / "first", tmp_path / "second"]
    rows = torch.cat([saved(paths[0], count=3, num_frozen_tokens=2), saved(paths[1], peft, count=4)])
    ours, by_peft = tmp_path / "ours", tmp_path / "peft"
    nbpeft.compose_cartridge_adapters(paths, output_path=ours, safe_serialization=safe)
    theirs.compose_cartridge_adapters(paths, output_path=by_peft, safe_serialization=safe)
    configs = [nbpeft.PeftConfig.from_pretrained(str(folder)) for folder in (ours, by_peft)]
    assert configs[0].to_dict() == configs[1].to_dict() and configs[0].num_frozen_tokens == 2  # type: ignore[attr-defined]
    found: list[Any] = [PeftModel.from_pretrained(llama(), folder) for folder in (ours, by_peft)]
    found += [peft.PeftModel.from_pretrained(llama(), ours)]
    for model in found:
        assert_close(model.get_prompt_embedding_to_save("default"), rows)
        assert_close(logits(model.eval(), tokens()), logits(found[0].eval(), tokens()))


def test_what_cannot_be_put_together_is_refused_and_nothing_written(tmp_path: Path) -> None:
    saved(tmp_path / "one", count=3)
    with_cartridge(gpt2(), count=3).save_pretrained(tmp_path / "wider")
    adapted().save_pretrained(tmp_path / "lora")
    for paths, message in (
        (["one"], "needs at least two adapters, not 1"),
        (["one", "lora"], "is not a CARTRIDGE adapter but LORA"),
        (["one", "wider"], "differ in token_dim cannot be concatenated: 16 .* 32"),
        (["one", "nowhere"], "nowhere"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            nbpeft.compose_cartridge_adapters([tmp_path / path for path in paths], output_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_suit_is_refused_and_changes_nothing() -> None:
    model = with_cartridge(llama(), count=4)
    randomize(model)
    model.add_adapter("lora", nbpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    projected = nbpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True)
    model.add_adapter("projected", projected)
    before = state(model)
    cache = llama()(input_ids=tokens(1), use_cache=True).past_key_values
    wide = gpt2()(input_ids=tokens(1), use_cache=True).past_key_values
    rows = llama()(input_ids=tokens(2), use_cache=True).past_key_values
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    five = [(keys[:, :, :5], values[:, :, :5]) for keys, values in pairs]
    uneven = [pairs[0], (pairs[1][0][:, :1], pairs[1][1])]
    for name, past, count, message in (
        ("lora", cache, None, "must be a CARTRIDGE or PREFIX_TUNING adapter, not LORA"),
        ("projected", cache, None, "prefix_projection=True a network computes"),
        ("other", cache, None, "other"),
        (None, cache, 10, "at least 10 cached tokens, but layer 0 .* has 9"),
        (None, cache, 3, "size|shape"),
        (None, five, -1, "num_virtual_tokens must be a positive whole number, not -1"),
        (None, five, 0, "num_virtual_tokens must be a positive whole number, not 0"),
        (None, wide, None, "size|shape"),
        (None, rows, None, "of one sequence"),
        (None, uneven, None, "of layer 1 .* the same heads"),
        (None, [], None, "is empty"),
        (None, 7, None, "must be a cache"),
    ):
        with pytest.raises(NbpeftError, match=message) as caught:
            nbpeft.initialize_kv_prefix_from_past_key_values(
                model, adapter_name=name, past_key_values=past, num_virtual_tokens=count
            )
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="has 2 tokens, fewer than the 4"):
        nbpeft.initialize_kv_prefix_from_text(model, tokenizer(), text="a b")
    with pytest.raises(ConfigError, match="num_virtual_tokens must be a positive whole number, not -1"):
        nbpeft.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT, num_virtual_tokens=-1)
    with pytest.raises(AdapterError):
        nbpeft.initialize_kv_prefix_from_text(llama(), tokenizer(), text=TEXT)
    with pytest.raises(ConfigError, match=r"shape \(4, 64\), not \(3, 64\)"):
        model.prompt_encoder["default"].load_prompt_embeddings(torch.zeros(3, 64))
    with pytest.raises(ConfigError, match="a network computes them"):
        model.prompt_encoder["projected"].load_prompt_embeddings(torch.zeros(4, 64))
    assert same_state(state(model), before)


@pytest.mark.parametrize("count", [-1, 5])
def test_frozen_tokens_are_some_of_all(count: int) -> None:
    with pytest.raises(ConfigError, match="num_frozen_tokens"):
        nbpeft.CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=count)
    whole = with_cartridge(llama(), count=4, num_frozen_tokens=4)
    assert not any(parameter.requires_grad and parameter.numel() for parameter in whole.parameters())
