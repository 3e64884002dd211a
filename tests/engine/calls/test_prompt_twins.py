"""Two models that learn a prompt over one base: each has its own, as in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import nbpeft
from nbpeft.engine.calls.prompt_twins import twin_without_prompts
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import StaleModelError
from tests.closeness import assert_close
from tests.tiny_models import classifier, llama

IDS = torch.arange(6)[None] + 3
KINDS: dict[str, dict[str, Any]] = {
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
}


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)).eval()


def numbers(model: Any) -> list[float]:
    with torch.no_grad():
        values: list[float] = model(input_ids=IDS, labels=IDS).logits[0, -1, :5].tolist()
    return values


def used(library: Any, kind: str, base: Any, folder: Path) -> list[Any]:
    """What two models with prompts give over one base, while one is trained and both are saved and read."""
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    made: list[Any] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = getattr(library, kind)(task_type=task, **KINDS[kind])
        made.append(library.get_peft_model(base, config).eval())
    one, other = made
    found = [[numbers(model), model.get_nb_trainable_parameters(), list(model.peft_config)] for model in made]
    optimizer = torch.optim.SGD([part for part in other.parameters() if part.requires_grad], lr=1.0)
    other(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert numbers(one) == found[0][0] and numbers(other) != found[1][0]
    for model, name in ((one, "one"), (other, "other")):
        model.save_pretrained(folder / name)
    read = library.PeftModel.from_pretrained(base, folder / "one")
    found.append(numbers(read))
    read.load_adapter(folder / "other", "other")
    read.set_adapter("other")
    return [*found, numbers(read), numbers(one), numbers(other)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [llama, t5], ids=["llama", "t5"])
def test_both_are_what_they_are_in_peft(kind: str, base: Any, tmp_path: Path) -> None:
    theirs, ours = (used(library, kind, base(), tmp_path / library.__name__) for library in (peft, nbpeft))
    for mine, its in zip(ours, theirs, strict=True):
        first, second = (found if isinstance(found[0], list) else [found] for found in (mine, its))
        assert_close(first[0], second[0])
        assert first[1:] == second[1:]


def prompted(base: Any, **fields: Any) -> Any:
    return nbpeft.get_peft_model(base, nbpeft.PromptTuningConfig(num_virtual_tokens=2, **fields)).eval()


def test_they_share_every_tensor_and_what_is_done_to_it() -> None:
    base = llama()
    one, other = prompted(base), prompted(base)
    shared = {name: value for name, value in one.named_parameters() if "prompt" not in name}
    others = dict(other.named_parameters())
    assert all(value is others[name] for name, value in shared.items()) and len(others) == len(shared) + 1
    expected = numbers(one)
    other.to(torch.float64)
    assert {value.dtype for value in (*one.parameters(), *other.parameters())} == {torch.float32, torch.float64}
    assert one.get_base_model().model.layers[0] is other.get_base_model().model.layers[0]
    assert_close(numbers(one.to(torch.float64)), expected)
    assert manager_of(base) is one.manager and manager_of(other.get_base_model()) is other.manager
    assert numbers(copy.deepcopy(other)) == numbers(other)
    with other.disable_adapter():
        bare = numbers(other)
    assert bare == numbers(other.unload())
    assert_close(numbers(one), expected)


def test_a_prompt_goes_over_adapters_of_another_handle_which_lives_on() -> None:
    base = llama()
    lora = nbpeft.get_peft_model(base, nbpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    alone = numbers(lora)
    over = prompted(base)
    assert numbers(lora) == alone and list(over.peft_config) == ["default"]
    with over.disable_adapter():
        assert numbers(over) == alone, "as in PEFT the base carries the layers of the first"
    assert numbers(over) != alone


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nbpeft.LoraConfig(target_modules=["embed_tokens"]), nbpeft.PromptTuningConfig(num_virtual_tokens=2)),
        (nbpeft.PromptTuningConfig(num_virtual_tokens=2), nbpeft.LoraConfig(target_modules=["q_proj"])),
    ],
    ids=["embedding", "layers"],
)
@pytest.mark.filterwarnings("ignore:You are trying to modify")
def test_other_handles_take_a_base_over_as_ever(first: Any, second: Any) -> None:
    base = llama()
    before = nbpeft.get_peft_model(base, first)
    after = nbpeft.get_peft_model(base, second, "second")
    assert after.get_base_model() is base
    with pytest.raises(StaleModelError, match="another PeftModel was created"):
        numbers(before)


@pytest.mark.filterwarnings("ignore:You are trying to modify")
def test_a_classifier_whose_head_is_trained_has_one_handle() -> None:
    base = classifier()
    before = prompted(base, task_type="SEQ_CLS")
    assert prompted(base, task_type="SEQ_CLS").get_base_model() is base
    with pytest.raises(StaleModelError):
        before(input_ids=IDS)


class Counting(ModelHook):  # type: ignore[misc]
    calls: list[nn.Module]

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(module)
        return args, kwargs


def test_a_forward_that_accelerate_replaced_is_the_twins() -> None:
    base, hook = llama(), Counting()
    hook.calls = []
    plain = numbers(base)
    for module in (base, base.model):
        add_hook_to_module(module, hook)
    one, other = prompted(base), prompted(base)
    numbers(other)
    twin: Any = other.get_base_model()
    assert hook.calls == [twin, twin.model] and twin is not base
    with one.disable_adapter(), other.disable_adapter():
        assert numbers(one) == numbers(other) == plain
    bare = twin_without_prompts(base)
    assert bare is not None and numbers(bare) == plain and manager_of(bare) is None
