"""What public scripts do to PEFT's models, tables and files besides calling its functions, on both libraries."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from transformers import GenerationConfig

import nbpeft
from tests.closeness import assert_close, assert_same, differ
from tests.tiny_models import llama, logits, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

LIBRARIES = pytest.mark.parametrize("library", [peft, nbpeft], ids=["peft", "nbpeft"])


def module_of(library: Any, place: str) -> Any:
    return importlib.import_module(f"{library.__name__}.{place}")


def lora(library: Any, base: nn.Module | None = None, **fields: Any) -> Any:
    """A model with LoRA of drawn values, the same for both libraries."""
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | fields
    model = library.get_peft_model(llama() if base is None else base, library.LoraConfig(**settings)).eval()
    randomize_all(model)
    return model


def randomize_all(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "prompt_encoder" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


# Files


@LIBRARIES
@pytest.mark.parametrize("saved", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_file_may_have_the_names_of_the_trained_parameters(library: Any, saved: str, tmp_path: Path) -> None:
    model = lora(peft)
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    assert any(".lora_A.default." in name for name in trained)
    model.peft_config["default"].save_pretrained(str(tmp_path))
    (torch.save if saved.endswith(".bin") else save_file)(trained, tmp_path / saved)
    assert_close(logits(library.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_those_names_are_read_into_an_adapter_of_that_name_alone(tmp_path: Path) -> None:
    model = lora(peft)
    model.peft_config["default"].save_pretrained(str(tmp_path))
    save_file({name: value.detach() for name, value in model.named_parameters() if "lora_" in name}, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(nbpeft.CheckpointError, match="nothing in the checkpoint fits"):
        nbpeft.PeftModel.from_pretrained(llama(), tmp_path, "other")


# Tables


@LIBRARIES
def test_default_targets_can_be_changed_in_the_table(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = module_of(library, "utils.other").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert table is module_of(library, "utils.constants").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(table, "llama", ["o_proj"])
    found = library.get_peft_model(llama(), library.LoraConfig()).targeted_module_names
    assert found == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    ours = library.get_peft_model(llama(), library.LoHaConfig(r=2)).targeted_module_names
    assert "model.layers.0.self_attn.q_proj" in ours, "the table of another method is another one"


@LIBRARIES
def test_so_can_those_of_a_model_that_the_library_does_not_know(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"model_type": "own"}
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    tables = module_of(library, "utils.constants")
    monkeypatch.setitem(tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "own", ["second"])
    monkeypatch.setitem(tables.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, "own", ["first", "second"])
    monkeypatch.setitem(tables.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING, "own", ["second"])
    assert library.get_peft_model(Own(), library.LoraConfig()).targeted_module_names == ["second"]
    scaled = library.get_peft_model(Own(), library.IA3Config()).base_model.model
    assert [scaled.first.is_feedforward, scaled.second.is_feedforward] == [False, True]


# Names that PEFT's modules have imported from one another


@pytest.mark.parametrize(
    ("place", "home", "names"),
    [
        ("peft_model", "utils", "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights WEIGHTS_NAME"),
        ("peft_model", "tuners.tuners_utils", "BaseTuner BaseTunerLayer"),
        ("tuners.lora.model", "import_utils", "is_bnb_available is_bnb_4bit_available"),
        ("tuners.lora.model", "utils", "_get_submodules ModulesToSaveWrapper"),
        ("tuners.lora.layer", "utils.other", "transpose"),
        ("tuners.lora.config", "utils", "PeftType"),
        ("tuners.ia3.layer", "tuners.tuners_utils", "BaseTunerLayer check_adapters_to_merge"),
    ],
)
def test_names_can_be_imported_from_where_peft_uses_them(place: str, home: str, names: str) -> None:
    for name in names.split():
        for library in (peft, nbpeft):
            assert getattr(module_of(library, place), name) is getattr(module_of(library, home), name)
    assert not hasattr(nbpeft, "is_bnb_available"), "the package itself has its own names alone"


# Models


@LIBRARIES
def test_hooks_and_a_forward_of_the_tuner_run(library: Any) -> None:
    model, seen = lora(library), []
    before = logits(model)
    hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    assert_close(logits(model), before)
    assert seen == ["LoraModel"]
    hook.remove()
    model.train()
    model.base_model.register_forward_hook(lambda module, args, output: seen.append(float(output.loss)))
    assert float(model(input_ids=tokens(), labels=tokens()).loss) == pytest.approx(seen[-1])
    model = lora(library)
    inner = model.base_model.forward
    model.base_model.forward = lambda *args, **kwargs: (seen.append("mine"), inner(*args, **kwargs))[1]
    assert_close(logits(model), before)
    assert seen[-1] == "mine"


@LIBRARIES
def test_the_settings_of_generate_can_be_replaced_on_the_handle(library: Any) -> None:
    model = lora(library)
    model.generation_config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert model.generate(input_ids=tokens()).shape == (2, 11)
    model.generation_config.max_new_tokens = 3
    assert model.generate(input_ids=tokens()).shape == (2, 12)
    assert model.get_base_model().generation_config is model.generation_config


# Learned prompts


PROMPTS = pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])


def prompted(library: Any, kind: str, cls: Any = None, **fields: Any) -> Any:
    settings = getattr(library, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM", **fields)
    model = (cls or library.get_peft_model)(llama(), settings).eval()
    randomize_all(model)
    return model


def by_hand(model: Any, ids: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """The prompt put in as public scripts do it."""
    embedded = model.word_embeddings(ids)
    with torch.no_grad():
        found: torch.Tensor = model.base_model(inputs_embeds=torch.cat([prompts.to(embedded), embedded], 1)).logits
    return found[:, -1]


@PROMPTS
@LIBRARIES
def test_a_prompt_that_the_script_puts_in_is_not_put_in_twice(library: Any, kind: str) -> None:
    model, ids = prompted(library, kind), tokens()
    wanted = logits(model)[:, -1]
    assert differ(wanted, logits(llama())[:, -1])
    assert_close(by_hand(model, ids, model.get_prompt(batch_size=2)), wanted)
    encoder, virtual = model.prompt_encoder["default"], model.prompt_tokens["default"]
    assert_close(by_hand(model, ids, encoder(virtual.unsqueeze(0).expand(2, -1))), wanted)
    assert_close(logits(model)[:, -1], wanted)  # and the model's own call puts it in again
    with torch.no_grad():
        embedded = model.word_embeddings(ids)
        assert_close(model(inputs_embeds=embedded).logits[:, -1], wanted)


@LIBRARIES
def test_a_forward_of_the_script_puts_it_in(library: Any) -> None:
    def forward(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        prompts = self.get_prompt(batch_size=len(input_ids)) * 2
        embedded = torch.cat([prompts, self.word_embeddings(input_ids)], 1)
        return self.base_model(inputs_embeds=embedded, **kwargs)

    own = type("Own", (library.PeftModelForCausalLM,), {"forward": forward})
    model = prompted(library, "PromptTuningConfig", own)
    doubled = prompted(library, "PromptTuningConfig")
    doubled.prompt_encoder["default"].embedding.weight.data *= 2
    assert_close(logits(model)[:, -1], logits(doubled)[:, -1])


def test_so_it_is_in_each_step_of_a_generation() -> None:
    model, ids = prompted(nbpeft, "PromptTuningConfig"), tokens()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(input_ids=ids, **settings)[:, ids.shape[1] :]
    embedded = torch.cat([model.get_prompt(2), model.word_embeddings(ids)], 1)
    assert torch.equal(model.base_model.generate(inputs_embeds=embedded, **settings), wanted)
    assert torch.equal(model.generate(input_ids=ids, **settings)[:, ids.shape[1] :], wanted)
    model.get_prompt(2)
    assert torch.equal(model.base_model.generate(ids, **settings)[:, ids.shape[1] :], wanted), "ids have no prompt"
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    wanted = model.generate(input_ids=ids, attention_mask=mask, **settings)
    model.get_prompt(2)
    assert torch.equal(model.base_model.generate(ids, attention_mask=mask, **settings), wanted)


def test_a_prefix_in_a_cache_is_not_put_in_twice() -> None:
    model, ids = prompted(nbpeft, "PrefixTuningConfig"), tokens()
    wanted = logits(model)[:, -1]
    mask = torch.ones(2, 3 + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        found = model.base_model(input_ids=ids, past_key_values=model.get_prompt(2), attention_mask=mask).logits
    assert_close(found[:, -1], wanted)


@pytest.mark.parametrize("place", ["subclass", "class", "instance"])
@PROMPTS
@LIBRARIES
def test_a_get_prompt_of_the_script_is_used(
    library: Any, kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = library.PeftModel.get_prompt

    def get_prompt(self: Any, batch_size: int, task_ids: Any = None, **kwargs: Any) -> Any:
        return own(self, batch_size, task_ids) * 0 + 0.25

    cls = library.PeftModelForCausalLM
    if place == "subclass":
        cls = type("Own", (cls,), {"get_prompt": get_prompt})
    elif place == "class":
        monkeypatch.setattr(library.PeftModel, "get_prompt", get_prompt)
    model = prompted(library, kind, cls)
    if place == "instance":
        model.get_prompt = lambda *args, **kwargs: get_prompt(model, *args, **kwargs)
    same = prompted(peft, "PromptTuningConfig")
    same.prompt_encoder["default"].embedding.weight.data.fill_(0.25)
    assert_close(logits(model)[:, -1], logits(same)[:, -1])
    settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    chosen = model.generate(input_ids=tokens(), **settings)[:, -1]
    assert torch.equal(chosen, logits(same)[:, -1].argmax(-1))


@LIBRARIES
def test_hooks_on_the_rows_of_a_prompt_run(library: Any) -> None:
    model, none = prompted(library, "PromptTuningConfig"), prompted(library, "PromptTuningConfig")
    model.prompt_encoder["default"].embedding.register_forward_hook(lambda module, args, output: output * 0)
    none.prompt_encoder["default"].embedding.weight.data.zero_()
    assert_close(logits(model), logits(none))


def test_an_encoder_that_needs_more_than_ids_says_so() -> None:
    config = nbpeft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, task_type="CAUSAL_LM")
    model = nbpeft.get_peft_model(llama(), config)
    with pytest.raises(nbpeft.AdapterError, match="task_ids cannot be None"):
        model.prompt_encoder["default"](torch.arange(3).unsqueeze(0))


# Attributes


@LIBRARIES
def test_the_rank_of_a_layer_may_be_set_with_factors_of_that_rank(library: Any, tmp_path: Path) -> None:
    model = lora(library)
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and "default" in module.lora_A]
    for layer in layers:
        layer.r["default"] = 2
        layer.lora_A["default"].weight.data = torch.full((2, layer.in_features), 0.1)
        layer.lora_B["default"].weight.data = torch.full((layer.out_features, 2), 0.1)
    assert len(layers) == 4 and {layer.r["default"] for layer in layers} == {2}
    same = lora(peft, r=2, lora_alpha=4)
    for name, parameter in same.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(0.1)
    assert_close(logits(model), logits(same))
    assert_close(logits(model.merge_and_unload()), logits(same))


def test_a_rank_alone_is_told() -> None:
    layer = lora(nbpeft).base_model.model.model.layers[0].self_attn.q_proj
    with pytest.warns(nbpeft.PeftWarning, match=r"setting r on a layer changes nothing: .* \(4 now\)"):
        layer.r["default"] = 16
    assert layer.r["default"] == 4


@LIBRARIES
def test_active_adapter_can_be_assigned_and_switches_no_layer(library: Any) -> None:
    model = lora(library)
    model.add_adapter("other", library.LoraConfig(r=2, init_lora_weights=False))
    before = logits(model)
    model.base_model.set_adapter(["default", "other"])
    model.active_adapter = "other"
    both = logits(model)
    assert differ(before, both)
    model.base_model.set_adapter("default")
    model.active_adapter = "other"
    assert_close(logits(model), before)


def test_that_is_told_and_a_prompt_is_switched() -> None:
    model = lora(nbpeft)
    with pytest.warns(UserWarning, match="active_adapter = 'other' switches no layer: call set_adapter"):
        model.active_adapter = "other"
    model = prompted(nbpeft, "PromptTuningConfig")
    model.add_adapter("other", nbpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.active_adapter = "other"
    assert model.active_adapters == ["other"] and model.get_prompt(1).shape[1] == 2


@LIBRARIES
def test_what_scripts_read_from_handles_and_tuners(library: Any) -> None:
    model = lora(library)
    assert model.base_model_prepare_inputs_for_generation.__func__.__name__ == "prepare_inputs_for_generation"
    fields: dict[str, Any] = {"init_r": 4, "target_r": 2, "total_step": 10, "tfinal": 2}
    config = library.AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **fields)
    adaptive = library.get_peft_model(llama(), config)
    assert adaptive.trainable_adapter_name == adaptive.base_model.trainable_adapter_name == "default"


@LIBRARIES
def test_a_layer_of_the_script_s_own_is_active_without_a_deleted_adapter(library: Any) -> None:
    layers = module_of(library, "tuners.lora.layer")
    config = library.LoraConfig(r=2)
    layer = layers.Linear(nn.Linear(4, 3), "one", config, r=2, lora_alpha=4)
    layer.update_layer("two", 2, 4, config)
    layer.set_adapter(["one", "two"])
    layer.delete_adapter("two")
    assert list(layer.active_adapters) == ["one"]
    layer.update_layer("two", 2, 4, config)
    layer.set_adapter("two")
    layer.delete_adapter("two")
    assert list(layer.active_adapters) == ["one"]


@LIBRARIES
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_a_class_of_the_script_loads_as_in_peft(library: Any, task: str | None, tmp_path: Path) -> None:
    base: Any = library.PeftModelForCausalLM

    class Own(base):  # type: ignore[misc]
        def __init__(self, model: Any, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> None:
            super().__init__(model, peft_config, adapter_name, **kwargs)
            self.calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().forward(*args, **kwargs)

    settings = library.LoraConfig(r=4, init_lora_weights=False, task_type=task)
    made = Own(llama(), settings).eval()
    wanted = logits(made)
    assert made.calls == 1
    made.save_pretrained(tmp_path)
    loaded = Own.from_pretrained(llama(), tmp_path)
    assert_close(logits(loaded), wanted)
    assert type(loaded) is (Own if task is None else base) and not loaded.training
    assert task is not None or loaded.calls == 1


def test_a_get_prompt_that_cannot_be_used_is_told() -> None:
    model = prompted(nbpeft, "PrefixTuningConfig")
    before, own = logits(model), model.get_prompt
    model.get_prompt = lambda batch_size, **kwargs: own(batch_size)
    with pytest.warns(nbpeft.PeftWarning, match=r"get_prompt\(\) of a script is not used for a prefix"):
        assert_close(logits(model), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda factor: torch.nn.utils.parametrizations.weight_norm(factor),
        lambda factor: torch.nn.utils.weight_norm(factor),
        lambda factor: torch.nn.utils.spectral_norm(factor),
        lambda factor: prune.l1_unstructured(factor, "weight", 0.5),
    ],
    ids=["parametrization", "weight_norm", "spectral_norm", "pruning"],
)
def test_a_factor_is_not_computed_from_others_and_stays(change: Any) -> None:
    model = lora(nbpeft)
    before, factor = logits(model), model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    kind, weight = type(factor), factor.weight
    with pytest.raises(nbpeft.AdapterError, match="weight of an adapter cannot be computed from other"):
        change(factor)
    assert type(factor) is kind and factor.weight is weight
    assert_same(logits(model), before)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert factor.weight.grad is not None


@LIBRARIES
def test_a_config_class_of_the_script_is_that_of_its_method(library: Any, tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Own(library.LoraConfig):  # type: ignore[misc, name-defined]
        further: int = 3

    model = library.get_peft_model(llama(), Own(target_modules=["q_proj"], init_lora_weights=False, further=5)).eval()
    assert type(model.base_model).__name__ == "LoraModel" and model.peft_config["default"].further == 5
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["further"] == 5
    assert_close(logits(library.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_a_model_whose_prompt_was_requested_is_freed() -> None:
    model = prompted(nbpeft, "PromptTuningConfig")
    model.get_prompt(1)
    states = weakref.ref(model.manager.active_state), weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert [state() for state in states] == [None, None]
