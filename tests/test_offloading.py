"""Base weights that accelerate keeps elsewhere between calls, as where a model is larger than its GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch

import nbpeft
from nbpeft.errors import CheckpointError, ConfigError, HotSwapError, MergeError
from nbpeft.model.saving.merge_export import merge_to_folder
from nbpeft.training.watching import generation
from tests.closeness import assert_close
from tests.tiny_models import adapted, llama, randomize, same_state

BOTH = ["q_proj", "v_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"target_modules": BOTH, "use_dora": True, "init_lora_weights": False},
    "AdaLoraConfig": {"target_modules": BOTH, "total_step": 10},
    "OFTConfig": {"target_modules": BOTH, "oft_block_size": 4, "r": 0},
    "LoHaConfig": {"target_modules": BOTH},
    "IA3Config": {"target_modules": BOTH, "feedforward_modules": []},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "ShiraConfig": {"target_modules": BOTH, "r": 2},
    "TrainableTokensConfig": {"token_indices": [1, 2]},
    "AdaptionPromptConfig": {"adapter_len": 3, "adapter_layers": 1},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
}
IDS = torch.arange(12).view(2, 6)
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
}


def base(*, offloaded: bool = True) -> Any:
    model = llama(tie_word_embeddings=False)
    if offloaded:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_act_where_the_layer_computes(name: str, tmp_path: Path) -> None:
    ours, theirs = (adapted(base(offloaded=offloaded), **CONFIGS[name]) for offloaded in (True, False))
    assert {parameter.device.type for parameter in ours.manager.parameters("default")} == {"cpu"}
    assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    ours.save_pretrained(tmp_path, save_embedding_layers=False)
    ours.load_adapter(tmp_path, "again")
    ours.set_adapter("again")
    assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_merging_is_refused_where_it_would_be_lost() -> None:
    model = adapted(base(), target_modules=["q_proj"])
    with pytest.raises(MergeError, match=r"q_proj: its weight is offloaded.*load the model without offloading"):
        model.merge_adapter()
    assert not model.manager.merged


def test_merging_into_a_folder_reads_what_is_offloaded(tmp_path: Path) -> None:
    for offloaded in (True, False):
        model = adapted(base(offloaded=offloaded), target_modules=["q_proj", "v_proj"])
        merge_to_folder(model, None, tmp_path / str(offloaded))
    names = [f"{offloaded}/model.safetensors" for offloaded in (True, False)]
    ours, theirs = ((tmp_path / name).read_bytes() for name in names)
    assert ours == theirs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head is offloaded and cannot be copied as a whole"),
        ({"bias": "all"}, "q_proj.bias has no data"),
    ],
)
def test_what_needs_the_weights_themselves_is_refused(config: dict[str, Any], message: str) -> None:
    model = base()
    before = model(input_ids=IDS).logits
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=message):
        adapted(model, target_modules=["q_proj"], **config)
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_prompts_go_to_where_the_embeddings_are_brought() -> None:
    for targets in (["q_proj"], ["embed_tokens"]):
        assert generation._input_device(adapted(base(), target_modules=targets).get_base_model()) == torch.device("cpu")


def test_adapters_that_were_there_first_are_offloaded_with_the_base() -> None:
    model = adapted(base(offloaded=False), target_modules=["q_proj", "v_proj"], init_lora_weights=False).eval()
    expected = model(input_ids=IDS).logits
    bare = model.get_base_model()
    accelerate.cpu_offload(bare, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.manager.parameters("default"))
    assert torch.equal(model(input_ids=IDS).logits, expected)
    accelerate.hooks.remove_hook_from_submodules(bare)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("name", METHODS)
def test_adapters_of_every_method_are_loaded_for_their_calls(name: str, tmp_path: Path) -> None:
    config = getattr(nbpeft, name)(task_type="CAUSAL_LM", **METHODS[name])
    model = nbpeft.get_peft_model(base(offloaded=False), config).eval()
    randomize(model)
    expected, saved = model(input_ids=IDS).logits, nbpeft.get_peft_model_state_dict(model)
    whole = copy.deepcopy(model)
    accelerate.cpu_offload(whole, execution_device=torch.device("cpu"), offload_buffers=True)
    assert all(parameter.is_meta for parameter in whole.parameters())
    for _ in range(2):
        assert_close(whole(input_ids=IDS).logits, expected)
    assert same_state(nbpeft.get_peft_model_state_dict(whole), saved)
    inner = "base_model." if config.is_prompt_learning else "base_model.model."
    devices = {f"{inner}{path}": "cpu" for path in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    devices |= {f"{inner}model.layers.0": "disk", f"{inner}model.layers.1": "cpu", "prompt_encoder": "cpu"}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_close(model(input_ids=IDS).logits, expected)
    assert same_state(nbpeft.get_peft_model_state_dict(model), saved)


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": BOTH, "bias": "all", "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": BOTH, "use_dora": True, "trainable_token_indices": [1, 2]},
    ],
)
def test_an_offloaded_adapter_is_saved(more: dict[str, Any], to_disk: bool, tmp_path: Path) -> None:
    model = adapted(base(offloaded=False), init_lora_weights=False, **more).eval()
    model.save_pretrained(tmp_path / "before")
    options = {"execution_device": torch.device("cpu")}
    if to_disk:
        accelerate.disk_offload(model, str(tmp_path / "offloaded"), **options)
    else:
        accelerate.cpu_offload(model, **options)
    assert all(parameter.is_meta for parameter in model.parameters())
    before = nbpeft.load_peft_weights(tmp_path / "before")
    for _ in range(2):  # what was saved is offloaded again
        model.save_pretrained(tmp_path / "after")
        assert same_state(nbpeft.load_peft_weights(tmp_path / "after"), before)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert same_state(nbpeft.get_peft_model_state_dict(model), before)
    with pytest.raises(CheckpointError, match="adapter 'default' is offloaded: load its tensors before"):
        nbpeft.set_peft_model_state_dict(model, before)
    accelerate.hooks.remove_hook_from_submodules(model)
    nbpeft.set_peft_model_state_dict(model, {key: value + 1 for key, value in before.items()})
    assert not same_state(nbpeft.get_peft_model_state_dict(model), before)


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_an_offloaded_adapter_is_replaced_by_loading_and_not_by_hot_swapping(rank: int, tmp_path: Path) -> None:
    other = adapted(base(offloaded=False), target_modules=BOTH, r=rank, init_lora_weights=False)
    other.save_pretrained(tmp_path)
    model = adapted(base(offloaded=False), target_modules=BOTH, r=4, init_lora_weights=False).eval()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    before = model(input_ids=IDS).logits
    for change in (
        lambda: nbpeft.hotswap_adapter(model, tmp_path, "default"),
        lambda: nbpeft.prepare_model_for_compiled_hotswap(model, target_rank=16),
        lambda: nbpeft.prepare_model_for_compiled_hotswap(model),
    ):
        with pytest.raises(HotSwapError, match=r"has no data .* replace it with load_adapter"):
            change()
        assert torch.equal(model(input_ids=IDS).logits, before) and model.peft_config["default"].r == 4
    model.load_adapter(tmp_path, "default")
    assert_close(model(input_ids=IDS).logits, other.eval()(input_ids=IDS).logits)


def test_embeddings_in_a_file_that_are_those_of_an_offloaded_base_are_left_out(tmp_path: Path) -> None:
    adapted(base(offloaded=False), target_modules=["embed_tokens"]).save_pretrained(tmp_path)
    model = nbpeft.PeftModel.from_pretrained(base(), tmp_path)
    state = nbpeft.load_peft_weights(tmp_path)
    nbpeft.set_peft_model_state_dict(model, state)
    with pytest.raises(CheckpointError, match=r"its own model.embed_tokens.weight, which is offloaded"):
        nbpeft.set_peft_model_state_dict(model, {key: value + 1 for key, value in state.items()})
    other = base(offloaded=False)
    other.get_input_embeddings().weight.detach().add_(1)
    accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"its own model.embed_tokens.weight, which is offloaded"):
        nbpeft.PeftModel.from_pretrained(other, tmp_path)


def test_hooks_of_a_base_layer_are_not_those_of_its_wrapper() -> None:
    model = adapted(base(), target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert hasattr(layer.base_layer, "_hf_hook") and not hasattr(layer, "_hf_hook")
    accelerate.hooks.remove_hook_from_module(model.get_base_model(), recurse=True)
    assert not hasattr(layer.base_layer, "_hf_hook")


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (nbpeft.LoraConfig(target_modules=BOTH, init_lora_weights=False), {"combination_type": "svd"}),
        (nbpeft.LoraConfig(target_modules=BOTH, use_dora=True), {"combination_type": "exact"}),
        (nbpeft.LoraConfig(target_modules=BOTH, trainable_token_indices=[1, 2]), {"combination_type": "cat"}),
        (nbpeft.IA3Config(target_modules=BOTH, feedforward_modules=[], init_ia3_weights=False), {}),
    ],
    ids=["lora", "dora", "rows", "ia3"],
)
def test_offloaded_adapters_are_combined(config: Any, settings: dict[str, Any], to_disk: bool, tmp_path: Path) -> None:
    """Where peft raises a bare error, or combines other values (IA³)."""
    outputs = []
    for offloaded in (False, True):
        model = nbpeft.get_peft_model(base(offloaded=False), copy.deepcopy(config)).eval()
        model.add_adapter("second", copy.deepcopy(config))
        for name in ("default", "second"):
            randomize(model, name, seed=len(name))
        options = {"execution_device": torch.device("cpu")}
        if offloaded and to_disk:
            accelerate.disk_offload(model, str(tmp_path), **options)
        elif offloaded:
            accelerate.cpu_offload(model, **options)
        model.add_weighted_adapter(["default", "second"], [0.5, 0.7], "both", **settings)
        assert offloaded == any(parameter.is_meta for parameter in model.manager.parameters("default"))
        model.set_adapter("both")
        outputs.append(model(input_ids=IDS).logits)
    assert_close(*outputs)
