"""Each of these goes wrong in PEFT 0.21.2 without an error, or half-way."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nbpeft
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import (
    BaseMismatchError,
    CheckpointError,
    MergeError,
    StaleModelError,
    TargetError,
)
from nbpeft.model import LoraConfig, PeftModel, get_peft_model
from tests.closeness import assert_approximates, assert_close
from tests.pretend_cpu import pretend_repacking
from tests.tiny_models import adapted, classifier, config, llama, logits, same_state, state, tokens


def test_1_failed_injection_changes_nothing() -> None:
    base = llama()
    before = state(base)
    with pytest.raises(TargetError, match=r"input_layernorm.*cannot be adapted"):
        get_peft_model(base, config(target_modules=["q_proj", "input_layernorm"]))
    assert same_state(before, state(base))
    assert all(p.requires_grad for p in base.parameters())
    assert manager_of(base) is None


def test_2_wrapping_again_reconfigures_the_adapter(tmp_path: Path) -> None:
    base = llama()
    get_peft_model(base, config(r=4))
    with pytest.warns(UserWarning, match="'default' is reconfigured"):
        model = get_peft_model(base, config(r=8, target_modules=["q_proj"]))
    assert {tuple(p.shape) for p in model.manager.parameters("default")} == {(8, 32), (32, 8)}
    assert not any("v_proj.adapters" in name for name, _ in model.named_parameters())
    with pytest.warns(UserWarning, match="'default' is reconfigured"):
        again = get_peft_model(model, config(r=2))
    assert again.get_base_model() is base
    assert again.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.shape == (32, 32)
    again.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(restored), logits(again.eval()))


def test_3_a_second_from_pretrained_replaces_the_first_with_a_warning(tmp_path: Path) -> None:
    adapted(lora_alpha=4).save_pretrained(tmp_path / "one")
    trained = adapted(lora_alpha=32)
    trained.save_pretrained(tmp_path / "two")
    base = llama()
    first = PeftModel.from_pretrained(base, tmp_path / "one")
    first.manager.unsaved.add("default")
    lost = "already has an adapter 'default': the loaded one replaces it; its unsaved weights"
    with pytest.warns(UserWarning, match=lost):
        second = PeftModel.from_pretrained(base, tmp_path / "two")
    assert torch.equal(logits(second), logits(trained))
    assert second.manager.names == ("default",) and not second.manager.unsaved
    with pytest.raises(StaleModelError):
        first.set_adapter("default")


def test_4_a_missing_target_is_told_with_near_names() -> None:
    with pytest.warns(RuntimeWarning, match=r"'v_porj'.*v_proj"):
        get_peft_model(llama(), config(target_modules=["q_proj", "v_porj"]))
    with pytest.raises(TargetError, match=r"'q_porj'.*Did you mean 'q_proj'"):
        get_peft_model(llama(), config(target_modules=["q_porj"]))


@pytest.mark.parametrize("name", ["a", "lora", "default2", "lora_A", "weight", "keys", "type", "base_layer"])
def test_5_names_touch_no_other_adapter(name: str, tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model)
    model.add_adapter(name, config(r=2))
    model.eval()
    assert [p.requires_grad for p in model.manager.parameters("default")] == [True] * 8
    assert not any(p.requires_grad for p in model.manager.parameters(name))
    model.set_adapter(name)
    other = logits(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(restored), other)
    model.delete_adapter(name)
    assert torch.equal(logits(model), expected)


def test_7_loading_onto_a_name_takes_the_new_config_too(tmp_path: Path) -> None:
    source = adapted(lora_alpha=32)
    source.save_pretrained(tmp_path)
    model = adapted(lora_alpha=8)
    model.load_adapter(tmp_path, "default")
    assert model.peft_config["default"].lora_alpha == 32
    assert torch.equal(logits(model), logits(source))


def test_8_a_checkpoint_that_fits_nothing_is_an_error(tmp_path: Path) -> None:
    inner = llama().model
    get_peft_model(inner, config()).save_pretrained(tmp_path)
    base = llama()
    before = state(base)
    with pytest.raises(CheckpointError, match=r"base_model\.model\.layers.*expected base_model\.model\.model\.layers"):
        PeftModel.from_pretrained(base, tmp_path)
    assert same_state(before, state(base)) and manager_of(base) is None
    loaded = PeftModel.from_pretrained(base, tmp_path, key_mapping={"^layers": "model.layers"})
    assert not torch.equal(logits(loaded), logits(llama()))


def test_8_some_missing_keys_are_listed(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    wider = LoraConfig(
        **{**{k: settings[k] for k in ("r", "lora_alpha")}, "target_modules": ["q_proj", "v_proj", "k_proj"]}
    )
    with pytest.warns(UserWarning, match=r"4 adapter keys are missing.*k_proj\.lora_A"):
        PeftModel.from_pretrained(llama(), tmp_path, config=wider)


def test_9_disable_adapter_restores_a_frozen_adapter_frozen() -> None:
    model = adapted()
    model.manager.freeze("default")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert not any(p.requires_grad for p in model.manager.parameters("default"))
    model.set_requires_grad("default", True)
    with model.disable_adapter():
        pass
    assert all(p.requires_grad for p in model.manager.parameters("default"))


def test_12_dora_beside_other_adapters_has_no_order() -> None:
    model = adapted(use_dora=True)
    model.add_adapter("other", config(target_modules=["q_proj"]))
    model.eval()
    for parameter in model.manager.parameters("default"):
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.set_adapter(["default", "other"])
    first = logits(model)
    model.set_adapter(["other", "default"])
    assert_close(first, logits(model))
    model.merge_adapter()
    assert_close(first, logits(model))


class Quantized(nn.Module):
    """A 4-bit layer with a bias, as lora_bias needs."""

    def __init__(self) -> None:
        super().__init__()
        import bitsandbytes as bnb

        torch.manual_seed(0)
        self.layer = bnb.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.float32, quant_type="nf4")
        self.layer.load_state_dict(nn.Linear(64, 64).state_dict())
        self.to("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:merging into")
def test_13_and_16_a_lora_bias_merges_safely_and_scaled_on_4_bit() -> None:
    base = Quantized()
    plain = base.layer.bias.detach().clone()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], lora_bias=True)).eval()
    bias = next(p for name, p in model.named_parameters() if name.endswith("lora_B.default.bias"))
    with torch.no_grad():
        bias.copy_(torch.arange(64.0))
    model.merge_adapter(safe_merge=True)
    assert_close(base.layer.base_layer.bias, plain + 2 * torch.arange(64.0))
    model.unmerge_adapter()
    assert torch.equal(base.layer.base_layer.bias, plain)


def test_14_an_adapter_of_another_base_is_told(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="other weights of the same shapes"):
        PeftModel.from_pretrained(llama(seed=1), tmp_path)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(llama(hidden_size=48), tmp_path)


@pytest.mark.filterwarnings("ignore:merging into")
def test_15_a_4_bit_weight_is_read_right_after_a_forward_repacked_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_repacking(monkeypatch, True)
    base = Quantized().eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = base(x)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["layer"], use_dora=True)).eval()
    with torch.no_grad():
        assert_close(model(x), expected, dtype=torch.bfloat16, depth=2)
    model.merge_adapter()
    with torch.no_grad():
        assert_approximates(model(x), expected, 0.1)


def test_17_a_base_has_one_handle_and_a_dead_one_says_so(tmp_path: Path) -> None:
    base = llama()
    first = adapted(base)
    with pytest.warns(UserWarning, match="'second' is added"):
        second = get_peft_model(base, config(), "second")
    with pytest.raises(StaleModelError, match="another PeftModel"):
        first(input_ids=tokens())
    merged = second.merge_and_unload()
    assert merged is base
    for use in (lambda: second(input_ids=tokens()), lambda: second.save_pretrained(tmp_path)):
        with pytest.raises(StaleModelError, match="can no longer be used"):
            use()
    assert not list(tmp_path.iterdir())


def test_18_modules_to_save_are_whole_path_segments(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.score, self.underscore = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    model = get_peft_model(Two(), LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trainable == {f"base_model.model.score.modules_to_save.default.{key}" for key in ("weight", "bias")}
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {"base_model.model.score.weight", "base_model.model.score.bias"} <= keys
    assert not any("underscore" in key for key in keys)


def test_a_random_head_is_trained_and_saved_along(tmp_path: Path) -> None:
    model = adapted(classifier(), task_type="SEQ_CLS")
    with torch.no_grad():
        for parameter in model.manager.parameters("default"):
            parameter.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(classifier(), tmp_path)), expected)


def test_21_thousands_of_patterns_cost_no_more_than_one() -> None:
    patterns = {f"layers.{index}.q_proj": index % 7 + 1 for index in range(5000)}
    table = config(rank_pattern=patterns)
    assert table.rank_at("model.layers.4321.q_proj") == 4321 % 7 + 1
    assert table.rank_at("model.layers.4321.k_proj") == 4
    assert config(rank_pattern={"q_proj": 2, r"layers\.1\..*": 3}).rank_at("model.layers.1.self_attn.q_proj") == 2
    assert config(rank_pattern={r"layers\.1\..*": 3, "q_proj": 2}).rank_at("model.layers.1.self_attn.q_proj") == 3


def test_deleting_what_is_merged_is_refused() -> None:
    model = adapted()
    model.add_adapter("other", config())
    model.merge_adapter()
    with pytest.raises(MergeError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()


@pytest.mark.parametrize("library", [nbpeft, peft])
def test_what_a_randomized_svd_took_out_is_found_again(library: Any, tmp_path: Path) -> None:
    """The file does not contain it; peft draws the numbers of the SVD again, from wherever the generator is."""
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa_niter_4"}
    base = llama()
    torch.manual_seed(5)
    model = library.get_peft_model(base, library.LoraConfig(**fields))
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = logits(library.PeftModel.from_pretrained(llama(), tmp_path))
    assert torch.equal(again, expected) == (library is nbpeft)


@pytest.mark.parametrize(
    ("kind", "padded", "fields"),
    [
        ("PrefixTuningConfig", False, {}),
        ("PromptEncoderConfig", True, {"encoder_hidden_size": 8}),
    ],
)
def test_a_prompt_is_in_each_step_of_a_generation(kind: str, padded: bool, fields: dict[str, Any]) -> None:
    settings = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(llama(), getattr(nbpeft, kind)(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.manager.parameters("default"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    ids, mask = tokens(), torch.ones_like(tokens())
    if padded:
        mask[1, :2] = 0
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=mask, **given)
    for _ in range(4):
        with torch.no_grad():
            chosen = model(input_ids=ids, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
    assert torch.equal(found, ids)
