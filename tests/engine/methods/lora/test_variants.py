"""Variants of LoRA beside peft: one file in both, the same numbers, training, merging and files from both."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from nbpeft.engine.contract.registry import method_of
from nbpeft.errors import ConfigError, HotSwapError, MergeError
from nbpeft.model import (
    LoraConfig,
    PeftModel,
    cast_adapter_dtype,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter_from_state_dict,
    set_peft_model_state_dict,
)
from tests.closeness import assert_approximates, assert_close, differ
from tests.test_matrix import Net
from tests.tiny_models import llama, logits, same_state, state, tokens

SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "MiCA": {"init_lora_weights": "mica", "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "BD-LoRA": {
        "use_bdlora": {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2},
        "target_modules": ["q_proj", "down_proj", "v_proj"],
    },
    "KaSA": {"kasa_config": {"beta": 1e-2, "gamma": 2e-2}},
    "KaSA with a bias": {"kasa_config": {}, "lora_bias": True, "use_rslora": True, "target_modules": ["q_proj"]},
    "QALoRA": {"use_qalora": True, "qalora_group_size": 8},
}
CASES["BD-LoRA"]["use_bdlora"]["match_strict"] = False

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning", "ignore:merging into")
each = pytest.mark.parametrize("case", [case for case in CASES if case != "QALoRA"])
"""PEFT has QA-LoRA on GPTQ layers alone."""


def settings(case: str, **more: Any) -> dict[str, Any]:
    return {**SETTINGS, "task_type": "CAUSAL_LM", **CASES[case], **more}


def adapted(case: str, **more: Any) -> PeftModel:
    return get_peft_model(llama(), LoraConfig(**settings(case, **more)))


def move(model: Any) -> None:
    """Moves what is trained off its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def from_one_file(case: str, folder: Path, **more: Any) -> tuple[Any, PeftModel]:
    """PEFT's model and ours with an adapter that PEFT has saved, both to be trained."""
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings(case, **more)))
    move(theirs)
    theirs.save_pretrained(folder)
    return theirs.eval(), PeftModel.from_pretrained(llama(), folder, is_trainable=True).eval()


def train(model: Any, steps: int = 8) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    losses = []
    for step in range(steps):
        batch = tokens(3, 11, seed=step % 4)
        loss = model(input_ids=batch, labels=batch).loss + model._get_kasa_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@each
def test_equal_to_peft_in_calls_training_and_files(case: str, tmp_path: Path) -> None:
    theirs, ours = from_one_file(case, tmp_path / "theirs")
    assert_close(logits(ours), logits(theirs))
    assert trained(ours).keys() == trained(theirs).keys()
    assert_close(train(ours), train(theirs))
    assert_close(logits(ours), logits(theirs))
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert_close(logits(back), logits(ours))
    written, given = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    changed = {name for name in given if written[name] != given[name]} - {"peft_version", "target_modules"}
    assert changed <= {"inference_mode"}


@each
def test_equal_to_peft_merged_and_unmerged(case: str, tmp_path: Path) -> None:
    theirs, ours = from_one_file(case, tmp_path)
    before, expected = state(ours), logits(ours)
    ours.merge_adapter()
    theirs.merge_adapter()
    assert_close(logits(ours), expected)
    assert_close(logits(ours), logits(theirs))
    ours.unmerge_adapter()
    assert same_state(before, state(ours))
    assert torch.equal(logits(ours), expected)


@each
def test_equal_to_peft_at_the_start(case: str) -> None:
    base = llama()
    before = state(base)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings(case))).eval()
    ours = get_peft_model(base, LoraConfig(**settings(case))).eval()
    assert_close(logits(ours), logits(theirs))
    assert method_of(ours.peft_config["default"]).label == case.split()[0]
    own, given = get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in given.items()}
    assert same_state(before, state(ours.unload()))


@each
def test_one_beside_another_adapter(case: str) -> None:
    model = adapted(case).eval()
    move(model)
    alone = logits(model)
    model.add_adapter("plain", LoraConfig(**SETTINGS, init_lora_weights=False))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), alone)
    model.delete_adapter("plain")
    assert torch.equal(logits(model), alone)


# MiCA


def test_mica_trains_the_first_factor_alone() -> None:
    model = adapted("MiCA")
    start = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    assert model.get_nb_trainable_parameters()[0] == sum(value.numel() for key, value in start.items() if "_A" in key)
    train(model, steps=2)
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, start[key]) == ("_A" not in key), key


def test_mica_stays_frozen_whatever_is_done_to_the_adapter() -> None:
    model = adapted("MiCA")
    fixed = [one for name, one in model.named_parameters() if "lora_B" in name or "embedding_B" in name]
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    for act in (
        lambda: model.set_adapter("default"),
        lambda: model.set_requires_grad("default", True),
        lambda: layer.set_adapter("default"),
        lambda: layer.set_requires_grad("default", True),
        lambda: (model.manager.freeze("default"), model.manager.unfreeze("default")),
        lambda: layer.update_layer("default", 4, 8, model.peft_config["default"]),
        lambda: copy.deepcopy(model),
    ):
        act()
        assert fixed and not any(one.requires_grad for one in fixed)
        assert layer.lora_A["default"].weight.requires_grad
    assert not layer.lora_B["default"].weight.requires_grad


def test_mica_in_half_precision_is_cast_as_a_whole() -> None:
    config = LoraConfig(**settings("MiCA"))
    model = get_peft_model(llama(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    factors = [one for name, one in model.named_parameters() if "lora_" in name]
    assert {one.dtype for one in factors} == {torch.bfloat16}
    cast_adapter_dtype(model, "default")
    assert {one.dtype for one in factors} == {torch.float32}


def test_mica_cannot_be_reset_on_a_layer_to_what_it_started_from() -> None:
    layer: Any = adapted("MiCA").get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with pytest.raises(ConfigError, match="delete it and add it again"):
        layer.reset_lora_parameters("default", "mica")


def test_mica_is_a_lora_for_those_that_serve_it() -> None:
    model = adapted("MiCA")
    move(model)
    model.add_weighted_adapter(["default"], [1.0], "plain", combination_type="linear")
    assert method_of(model.peft_config["plain"]).label == "LoRA"
    expected = logits(model)
    model.set_adapter("plain")
    assert_close(logits(model), expected)


# BD-LoRA


def test_bdlora_has_the_modules_that_peft_has() -> None:
    ours, theirs = adapted("BD-LoRA"), peft.get_peft_model(llama(), peft.LoraConfig(**settings("BD-LoRA")))
    x = torch.randn(3, 64)
    for name in ("mlp.down_proj", "self_attn.q_proj"):
        layers = [model.get_submodule(f"base_model.model.model.layers.0.{name}") for model in (ours, theirs)]
        found, expected = (layer.lora_A["default"] for layer in layers)
        expected.weight.data.copy_(found.weight)
        assert_close(found(x[:, : found.in_features]), expected(x[:, : found.in_features]))
        assert (found.in_features, found.out_features) == (expected.in_features, expected.out_features)
    down = ours.get_submodule("base_model.model.model.layers.0.mlp.down_proj").lora_A["default"]
    assert down.nblocks == 2 and down.weight_as_blockdiagonal_matrix().shape == (4, 64)
    assert torch.equal(down(x), x @ down.weight_as_blockdiagonal_matrix().T)
    assert "BlockDiagonalLinear(in_features=64, out_features=4, nblocks=2)" in repr(ours)


def test_bdlora_with_hooks_gives_the_same() -> None:
    model = adapted("BD-LoRA").eval()
    move(model)
    expected, calls = logits(model), []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *given: calls.append(given))
    assert_close(logits(model), expected)
    assert len(calls) == 6


def test_bdlora_draws_its_blocks_as_peft_does() -> None:
    """Uniform numbers whose variance is 2 / fan-in of a block; the other factor as LoRA's."""
    config = LoraConfig(r=64, target_modules=["target"], use_bdlora={"target_modules_bd_a": ["target"], "nblocks": 4})
    model = get_peft_model(nn.ModuleDict({"target": nn.Linear(256, 8)}), config)
    tensors = {key.split(".")[-2]: value for key, value in get_peft_model_state_dict(model).items()}
    assert tensors["lora_A"].shape == (64, 64) and not tensors["lora_B"].any()
    assert_approximates(tensors["lora_A"].std(), torch.tensor((2 / 64) ** 0.5), 0.05)


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
@pytest.mark.parametrize("case", ["BD-LoRA", "QALoRA", "KaSA"])
def test_computed_factors_are_combined_and_converted_as_plain_ones(case: str) -> None:
    model = adapted(case).eval()
    move(model)
    expected = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "plain", combination_type="linear")
    assert method_of(model.peft_config["plain"]).label == "LoRA"
    model.set_adapter("plain")
    assert_close(logits(model), expected)
    config, tensors = convert_to_lora(adapted_like(model), rank=8)
    plain = get_peft_model(llama(), config).eval()
    set_peft_model_state_dict(plain, tensors)
    assert_close(logits(plain), expected)


def adapted_like(model: PeftModel) -> PeftModel:
    """The model with its first adapter alone."""
    model.delete_adapter("plain")
    model.set_adapter("default")
    return model


def test_bdlora_takes_another_of_its_rank_in_place_and_no_other() -> None:
    model, other = adapted("BD-LoRA").eval(), adapted("BD-LoRA").eval()
    move(other)
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])
    assert torch.equal(logits(model), logits(other))
    larger = adapted("BD-LoRA", r=8)
    tensors = get_peft_model_state_dict(larger)
    with pytest.raises(HotSwapError, match="cannot be padded to rank 8"):
        hotswap_adapter_from_state_dict(model, tensors, "default", larger.peft_config["default"])
    with pytest.raises(HotSwapError, match="takes no other rank than its own, 8"):
        hotswap_adapter_from_state_dict(
            larger, get_peft_model_state_dict(model), "default", model.peft_config["default"]
        )
    assert torch.equal(logits(model), logits(other))


# QA-LoRA


class QuantLinear(nn.Module):
    """A layer as those of gptqmodel: packed numbers that only its own forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 16, 24
        self.register_buffer("qweight", torch.randint(-8, 8, (24, 16), dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 16)


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    """Makes models with a layer that both libraries take for one of gptqmodel, which is not installed."""
    library = types.ModuleType("gptqmodel.nn_modules.qlinear")
    library.BaseQuantLinear = QuantLinear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setattr("peft.tuners.lora.gptq.is_gptqmodel_available", lambda: True)

    def make() -> nn.Module:
        torch.manual_seed(3)
        return Net(QuantLinear(), nn.Tanh()).eval()

    return make


def steps(model: nn.Module) -> torch.Tensor:
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for seed in range(8):
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed))
        (model(x) - 0.5).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(x).detach()


def test_qalora_is_equal_to_peft_on_gptq_layers(gptq: Callable[[], nn.Module], tmp_path: Path) -> None:
    fields = {"r": 4, "target_modules": ["target"], "use_qalora": True, "qalora_group_size": 4}
    theirs = peft.get_peft_model(gptq(), peft.LoraConfig(**fields, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(gptq(), tmp_path / "theirs", is_trainable=True)
    x = torch.randn(2, 16)
    with torch.no_grad():
        assert_close(ours(x), theirs(x))
    assert_close(steps(ours), steps(theirs))
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(gptq(), tmp_path / "ours")
    layer: Any = back.get_submodule("base_model.model.target")
    assert layer.lora_A["default"].weight.shape == (4, 4) and layer.qalora_group_size["default"] == 4
    assert ours.get_submodule("base_model.model.target").qalora_group_size["default"] == 4
    with torch.no_grad():
        assert_close(back(x), ours(x))
    with pytest.raises(MergeError, match="gptq") as failure:
        ours.merge_adapter()
    assert "\n" not in str(failure.value)


def test_qalora_drops_inputs_before_it_takes_their_means() -> None:
    model = adapted("QALoRA", lora_dropout=1.0)
    move(model)
    with model.disable_adapter():
        expected = logits(model)
    assert torch.equal(logits(model.train()), expected) and not torch.equal(logits(model.eval()), expected)


def test_qalora_takes_another_rank_in_place() -> None:
    model, larger = adapted("QALoRA").eval(), adapted("QALoRA", r=8, lora_alpha=5).eval()
    move(larger)
    config, tensors = larger.peft_config["default"], get_peft_model_state_dict(larger)
    hotswap_adapter_from_state_dict(model, tensors, "default", config)
    assert_close(logits(model), logits(larger))


# KaSA


def test_kasa_adds_to_the_loss_once_and_only_in_training(tmp_path: Path) -> None:
    theirs, ours = from_one_file("KaSA", tmp_path)
    batch = tokens(2, 7)
    theirs.eval()
    expected = theirs(input_ids=batch, labels=batch).loss
    assert_close(ours.eval()(input_ids=batch, labels=batch).loss, expected)
    assert_close(ours._get_kasa_loss(), theirs._get_kasa_loss())
    assert_close(ours._get_kasa_loss("default"), theirs._get_kasa_loss(["default"]))
    ours.train()(input_ids=batch)
    found = ours(input_ids=batch, labels=batch).loss
    assert_close(found, expected + theirs._get_kasa_loss())
    assert torch.equal(found + ours._get_kasa_loss(), found)
    assert_close(expected + ours._get_kasa_loss(), found)


def test_kasa_leaves_the_base_as_it_is() -> None:
    base = llama()
    plain, before = logits(base), state(base)
    model = get_peft_model(base, LoraConfig(**settings("KaSA"))).eval()
    assert differ(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    values = torch.linalg.svdvals(layer.base_layer.weight + layer.get_delta_weight("default"))
    assert int((values > 1e-5).sum()) == 32 - 4
    model.merge_adapter()
    model.unmerge_adapter()
    assert same_state(before, state(model.unload()))


def test_kasa_is_saved_as_a_lora_of_twice_the_rank(tmp_path: Path) -> None:
    model = adapted("KaSA with a bias").eval()
    move(model)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path))
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.kasa_config) == (8, None)
    back = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_close(logits(back), logits(model))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kasa_config": {}, "r": 32}, "kasa_config takes a rank of at most 31 there, not 32"),
        ({"kasa_config": {}, "lora_alpha": 0}, "kasa_config needs an alpha above 0"),
        ({"kasa_config": {"beta": -1.0}}, "beta must not be negative, as -1.0 is"),
        (
            {"kasa_config": {}, "init_lora_weights": "olora"},
            "kasa_config cannot be used with init_lora_weights",
        ),
        ({"kasa_config": {}, "alora_invocation_tokens": [1]}, "cannot be combined with kasa_config"),
        ({"kasa_config": {}, "target_modules": ["embed_tokens"]}, "kasa_config works on linear layers only"),
        (
            {"use_qalora": True, "qalora_group_size": 7},
            "32 inputs cannot be split into groups of qalora_group_size = 7",
        ),
        ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size must be a positive whole number, not 0"),
        ({"use_qalora": True, "use_dora": True}, "use_dora cannot be combined with use_qalora"),
        ({"use_qalora": True, "target_modules": ["embed_tokens"]}, "works on linear layers only"),
        ({"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}}, "both name .q"),
        ({"use_bdlora": {"target_modules_bd_a": ["attn", "down"], "target_modules_bd_b": ["q_p"]}}, "both name it"),
        ({"use_bdlora": {"target_modules_bd_a": ["down_proj"]}}, "match_strict=False gives such layers plain"),
        ({"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 3}}, "4 x 32, cannot have nblocks = 3"),
        ({"use_bdlora": {"nblock": 3}}, "Did you mean 'nblocks'"),
        ({"use_bdlora": {"nblocks": 0}}, "nblocks must be a positive whole number, not 0"),
        ({"use_bdlora": {}, "init_lora_weights": "pissa"}, "use_bdlora cannot be used with init_lora_weights='pissa'"),
        ({"use_bdlora": {}, "lora_bias": True}, "use_bdlora cannot be used with lora_bias=True"),
        ({"init_lora_weights": "mica", "use_dora": True}, "use_dora cannot be combined with mica"),
        ({"init_lora_weights": "mica", "lora_bias": True}, "lora_bias=True is supported with"),
    ],
)
def test_what_a_variant_cannot_do_is_refused_in_one_line(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as failure:
        get_peft_model(llama(), LoraConfig(**{**SETTINGS, **more}))
    assert "\n" not in str(failure.value)
