"""LLaMA-Adapter: equal to peft where it is right, with a cache, beside others, in mixed batches, and gone again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import nbpeft
from nbpeft.engine.runtime.snapshots import restore, snapshot
from nbpeft.errors import ConfigError, MergeError, NbpeftError
from nbpeft.model import PeftModel, get_peft_model
from nbpeft.model.handle.serving import blended
from tests.closeness import assert_close
from tests.tiny_models import LLAMA, config, gpt2, llama, logits, randomize, same_state, state, tokens
from tests.training.test_learned_prompts import rows

pytestmark = pytest.mark.filterwarnings("ignore")
GENERATE: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def plain(**changes: Any) -> Any:
    return llama(**{"attention_bias": False, "initializer_range": 0.3} | changes)


def mistral() -> Any:
    torch.manual_seed(0)
    sizes = {key: value for key, value in LLAMA.items() if key != "attention_bias"}
    return MistralForCausalLM(MistralConfig(**sizes, initializer_range=0.3, sliding_window=4)).eval()


def lively_gpt2() -> Any:
    return gpt2(initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


BASES = pytest.mark.parametrize("base", [plain, mistral, lively_gpt2], ids=["llama", "mistral", "gpt2"])


def fields(**changes: Any) -> dict[str, Any]:
    return {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"} | changes


def prompted(base: Any = None, name: str = "default", **changes: Any) -> PeftModel:
    """A model with an adapter that changes what it gives."""
    made = nbpeft.AdaptionPromptConfig(**fields(**changes))
    model = get_peft_model(plain() if base is None else base, made, name)
    randomize(model, name, scale=1.0)
    return model.eval()


def steps(model: Any) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@BASES
def test_start_training_and_files_are_those_of_peft(base: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    ours = get_peft_model(base(), nbpeft.AdaptionPromptConfig(**fields()))
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base(), peft.AdaptionPromptConfig(**fields()))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert torch.equal(logits(ours), logits(base()))
    expected = steps(theirs)
    assert_close(steps(ours), expected)
    assert expected[-1] < expected[0] - 1e-3
    assert all(one.grad is None for one in ours.get_base_model().parameters() if not one.requires_grad)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    saved, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert saved.keys() == other.keys() == nbpeft.get_peft_model_state_dict(ours).keys()
    for key, value in other.items():
        assert_close(saved[key], value)
    found = logits(ours.eval())
    for library in (nbpeft.PeftModel, peft.PeftModel):
        assert_close(logits(library.from_pretrained(base(), tmp_path / "ours").eval()), found)
    again = PeftModel.from_pretrained(base(), tmp_path / "theirs", is_trainable=True).eval()
    assert_close(logits(again), logits(theirs.eval()))
    assert again.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()
    assert nbpeft.set_peft_model_state_dict(again, saved).missing_keys == [] and torch.equal(logits(again), found)


@BASES
@torch.no_grad()
def test_generate_gives_what_forward_gives_also_padded(base: Callable[[], Any]) -> None:
    model = prompted(base())
    short, long = tokens(1, 5), tokens(1, 9)
    expected = {}
    for ids in (short, long):
        made = ids
        for _ in range(5):
            made = torch.cat([made, model(input_ids=made).logits[:, -1:].argmax(-1)], 1)
        expected[ids.shape[1]] = made[0, ids.shape[1] :]
        for use_cache in (True, False):
            assert torch.equal(model.generate(input_ids=ids, **GENERATE, use_cache=use_cache), made)
        assert torch.equal(model.generate(input_ids=ids, **GENERATE, num_beams=1, cache_implementation="static"), made)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=long, **GENERATE)[0, 9:], expected[9])
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
    found = model.generate(input_ids=padded, attention_mask=mask, **GENERATE)
    assert torch.equal(found[0, 9:], expected[5]) and torch.equal(found[1, 9:], expected[9])


def test_a_bias_of_the_output_counts_once_and_in_peft_twice() -> None:
    def biased() -> Any:
        base = llama()
        with torch.no_grad():
            for layer in base.model.layers:
                layer.self_attn.o_proj.bias.fill_(0.5)
        return base

    assert torch.equal(logits(get_peft_model(biased(), nbpeft.AdaptionPromptConfig(**fields()))), logits(biased()))
    theirs = peft.get_peft_model(biased(), peft.AdaptionPromptConfig(**fields()))
    assert (logits(theirs) - logits(biased())).abs().max() > 1e-3


def several(base: Any = None) -> PeftModel:
    model = prompted(base, "both")
    model.add_adapter("top", nbpeft.AdaptionPromptConfig(**fields(adapter_layers=1, adapter_len=3)))
    model.add_adapter("lora", config(target_modules=["c_attn" if base is not None else "q_proj"]))
    model.add_adapter("soft", nbpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    for seed, name in enumerate(model.peft_config):
        randomize(model, name, seed=seed, scale=1.0)
    return model.eval()


@pytest.mark.parametrize("base", [None, lively_gpt2], ids=["llama", "gpt2"])
@torch.no_grad()
def test_each_row_of_a_mixed_batch_is_as_alone(base: Any) -> None:
    model, ids = several(None if base is None else base()), tokens(5)
    names = ["both", "__base__", "top", "lora", "soft"]
    found = model(input_ids=ids, adapter_names=names).logits
    beams = model.generate(input_ids=ids, adapter_names=names, **GENERATE, num_beams=2)
    for row, name in enumerate(names):
        one = ids[row : row + 1]
        with model.disable_adapter() if name == "__base__" else model.use(name):
            assert_close(found[row, -9:], logits(model, one)[0, -9:])
            assert torch.equal(beams[row], model.generate(input_ids=one, **GENERATE, num_beams=2)[0]), name


@torch.no_grad()
def test_several_act_together_each_with_its_scale() -> None:
    model = several()
    attention = model.get_base_model().model.layers[1].self_attn
    seen: list[Tensor] = []
    attention.register_forward_hook(lambda module, args, output: seen.append(output[0]))

    def top_of(*names: str) -> Tensor:
        with model.use(list(names)):
            logits(model)
        return seen[-1]

    model.set_adapter("top")
    with model.disable_adapter():
        logits(model)
    off, alone = seen[-1], top_of("top")
    model.manager.set_scale("top", 0.5)
    assert_close(top_of("top") - off, 0.5 * (alone - off))
    model.manager.set_scale("top", 1.0)
    with blended(model.manager, {"top": -1.0}):
        logits(model)
    assert_close(seen[-1] - off, off - alone)
    model.manager.copy("top", "twin")
    assert_close(top_of("top", "twin") - off, 2 * (alone - off))
    assert (top_of("top", "lora") - alone).abs().max() > 1e-3


def test_checkpointing_and_half_precision_change_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = prompted(plain())
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        grads.append([one.grad.clone() for one in model.manager.parameters("default")])
    for first, second in zip(*grads, strict=True):
        assert_close(first, second)
        assert first.any()
    half = prompted(plain(dtype=torch.bfloat16))
    assert {one.dtype for one in half.manager.parameters("default")} == {torch.float32}
    assert logits(half).dtype == torch.bfloat16
    assert_close(logits(half).float(), logits(prompted()), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(logits(prompted()).float(), logits(half).float(), dtype=torch.bfloat16)


def test_it_leaves_nothing_behind() -> None:
    base = plain()
    before, expected = state(base), logits(base)
    model = prompted(base)
    first = logits(model)
    twin = copy.deepcopy(model)
    randomize(twin, seed=5)
    assert not torch.equal(logits(twin), first) and torch.equal(logits(model), first)
    kept = snapshot(model.manager, "default")
    model.add_adapter("other", nbpeft.AdaptionPromptConfig(**fields(adapter_layers=1)))
    model.delete_adapter("default")
    restore(model.manager, kept)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert model.unload() is base and same_state(state(base), before) and torch.equal(logits(base), expected)
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in base.modules())


def test_packed_rows_and_sweeps_train_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none"}
    losses = []
    for packing in (False, True):
        result = nbpeft.train(prompted(), rows(), output_dir=str(tmp_path / str(packing)), packing=packing, **settings)
        losses.append(result.steps)
    assert losses == [2, 2]
    rates = nbpeft.sweep(1e-2, 1e-1)
    model = prompted()
    nbpeft.train(model, rows(), output_dir=str(tmp_path / "sweep"), learning_rate=rates, **settings)
    alone = prompted()
    nbpeft.train(alone, rows(), output_dir=str(tmp_path / "alone"), learning_rate=1e-1, **settings)
    for found, expected in zip(
        model.manager.parameters("default-lr1e-1"), alone.manager.parameters("default"), strict=True
    ):
        assert_close(found, expected)


def test_what_makes_no_sense_is_refused_in_one_line(tmp_path: Path) -> None:
    for changes, line in (
        ({"adapter_len": None}, "adapter_len must be a positive whole number"),
        ({"adapter_layers": 0}, "adapter_layers must be a positive whole number"),
        ({"adapter_layers": 3}, "more adapter layers '3' than the model has '2' of 'self_attn'"),
        ({"target_modules": "self_atn"}, "Did you mean 'self_attn'"),
        ({"target_modules": "all-linear"}, "target_modules is the name of the attentions; leave it out"),
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules must be a text"),
        ({"target_modules": ["mlp"]}, "is no attention of llama: target_modules is their name, 'self_attn'"),
    ):
        with pytest.raises(ConfigError, match=line):
            prompted(**changes)
    other = plain()
    other.config.model_type = "opt"
    with pytest.raises(ConfigError, match="Unsupported model type for adaption prompt: 'opt'"):
        prompted(other)
    model = prompted()
    assert not hasattr(model, "prompt_encoder") and model.active_peft_config.is_adaption_prompt
    with pytest.raises(MergeError, match="what it adds to an attention depends on the queries"):
        model.merge_and_unload()
    with pytest.raises(NbpeftError, match="cannot be merged into the weights: what it adds"):
        nbpeft.convert_to_lora(model, 4)
    model.save_pretrained(tmp_path)
    with pytest.raises(NbpeftError, match="load the other one under another name"):
        nbpeft.hotswap_adapter(model, tmp_path, "default")


@pytest.mark.parametrize("beside", ["lora_bias", "ia3"])
def test_what_others_add_to_the_output_layer_counts_once(beside: str) -> None:
    model = prompted(plain(attention_bias=beside == "ia3"))
    if beside == "ia3":
        other: Any = nbpeft.IA3Config(target_modules=["o_proj"], feedforward_modules=[])
    else:
        other = nbpeft.LoraConfig(r=2, target_modules=["o_proj"], lora_bias=True)
    model.add_adapter("other", other)
    randomize(model, "other", scale=1.0)
    model.set_adapter("other")
    alone = logits(model)
    for name, parameter in model.named_parameters():
        if "adaption_gate" in name:
            parameter.data.zero_()
    model.base_model.set_adapter(["default", "other"])
    assert_close(logits(model), alone)
