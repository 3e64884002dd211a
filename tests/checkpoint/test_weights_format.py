"""Keys of PEFT's files, both ways, against files that peft wrote."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.checkpoint import Expected
from nbpeft.checkpoint.key_conversion import KeyConversion
from nbpeft.engine.contract.adapter import AdapterWeights
from nbpeft.errors import BaseMismatchError, CheckpointError
from tests.checkpoint.peft_files import Mixed, expected_by_peft, saved_by_peft
from tests.tiny_models import gpt2, llama

from_file = partial(checkpoint.from_file, peft_type="LORA")
to_file = partial(checkpoint.to_file, peft_type="LORA")

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "dora": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "modules_to_save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding, convolution": (Mixed, {"target_modules": ["embed", "conv"]}),
    "embedding, convolution with dora": (Mixed, {"target_modules": ["embed", "conv"], "use_dora": True}),
    "names like the method's": (Mixed, {"target_modules": ["lora_A", "score"]}),
    "bias lora_only": (Mixed, {"target_modules": ["lora_A", "conv"], "bias": "lora_only"}),
    "bias all": (Mixed, {"target_modules": ["lora_A"], "bias": "all"}),
    "bias all, a copy": (Mixed, {"target_modules": ["lora_A"], "bias": "all", "modules_to_save": ["conv"]}),
    "bias of gpt2": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "lora_bias": (llama, {"target_modules": ["q_proj"], "lora_bias": True}),
}


def file_and_expected(name: str, folder: Path) -> tuple[dict[str, Tensor], Expected]:
    build, fields = CASES[name]
    adapted = saved_by_peft(build(), folder, **fields)
    return load_file(folder / "adapter_model.safetensors"), expected_by_peft(adapted, fields.get("bias", "none"))


@pytest.mark.parametrize("name", CASES)
def test_files_of_peft_both_ways(name: str, tmp_path: Path) -> None:
    tensors, expected = file_and_expected(name, tmp_path)
    loaded = from_file(tensors, expected)
    assert loaded.missing == []
    assert loaded.unexpected == []
    assert {path: set(parameters) for path, parameters in loaded.weights.adapters.items()} == {
        path: set(parameters) for path, parameters in expected.adapters.items()
    }
    assert set(loaded.weights.base) == set(expected.base)
    again = to_file(loaded.weights)
    # peft writes the bias of a copied module a second time under a key that nobody needs.
    assert again.keys() == {key for key in tensors if ".modules_to_save." not in key}
    assert all(again[key] is tensors[key] for key in again)


SMALL = Expected(
    {"layers.0.q": {"lora_A": (2, 4), "lora_B": (4, 2)}, "layers.1.q": {"lora_A": (2, 4), "lora_B": (4, 2)}}
)


def small_file(prefix: str = "base_model.model.", nesting: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{nesting}layers.{i}.q.lora_{side}.weight": torch.zeros(2, 4) if side == "A" else torch.zeros(4, 2)
        for i in range(2)
        for side in "AB"
    }


@pytest.mark.parametrize(
    "prefix",
    ["base_model.model.", "", "_orig_mod.base_model.model.", "base_model.model._orig_mod."],
)
def test_prefixes(prefix: str) -> None:
    loaded = from_file(small_file(prefix), SMALL)
    assert not loaded.missing
    assert not loaded.unexpected


def test_marks_of_wrappers_inside_a_key() -> None:
    file = {key.replace(".q.", "._fsdp_wrapped_module.q."): tensor for key, tensor in small_file().items()}
    assert not from_file(file, SMALL).missing


def test_key_mapping_first_match_wins() -> None:
    file = small_file(nesting="old.model.")
    mapping = {r"^old\.model\.": "", r"^layers": "never"}
    assert not from_file(file, SMALL, key_mapping=mapping).missing
    with pytest.raises(CheckpointError, match="regular expression"):
        from_file(file, SMALL, key_mapping={"(": ""})


def test_rename_is_tried_for_keys_that_nothing_takes() -> None:
    loaded = from_file(
        small_file(nesting="old."), SMALL, conversion=KeyConversion(lambda key: key.removeprefix("old."), {})
    )
    assert not loaded.missing
    assert not loaded.unexpected


@pytest.mark.parametrize("nesting", ["model.", "other.model."])
def test_nothing_fits_shows_both_and_a_way_out(nesting: str) -> None:
    file = small_file(nesting=nesting)
    with pytest.raises(CheckpointError, match="nothing in the checkpoint fits") as caught:
        from_file(file, SMALL)
    message = str(caught.value)
    assert f"base_model.model.{nesting}layers.0.q.lora_A.weight" in message
    assert "base_model.model.layers.0.q.lora_A.weight" in message
    assert "(+ 1 more)" in message
    assert "\n" not in message
    hint = caught.value.details["key_mapping"]
    assert isinstance(hint, dict)
    assert not from_file(file, SMALL, key_mapping=hint).missing


def test_the_way_out_when_the_model_is_nested_deeper() -> None:
    deeper = Expected({f"model.{path}": shapes for path, shapes in SMALL.adapters.items()})
    with pytest.raises(CheckpointError) as caught:
        from_file(small_file(), deeper)
    hint = caught.value.details["key_mapping"]
    assert isinstance(hint, dict)
    assert not from_file(small_file(), deeper, key_mapping=hint).missing


def test_an_empty_file_says_so() -> None:
    with pytest.raises(CheckpointError, match="no tensors"):
        from_file({}, SMALL)


def test_missing_and_unexpected_are_listed() -> None:
    file = small_file()
    del file["base_model.model.layers.1.q.lora_A.weight"]
    file["base_model.model.layers.7.q.lora_A.weight"] = torch.zeros(2, 4)
    loaded = from_file(file, SMALL)
    assert loaded.missing == ["base_model.model.layers.1.q.lora_A.weight"]
    assert loaded.unexpected == ["base_model.model.layers.7.q.lora_A.weight"]


def test_two_keys_for_one_place() -> None:
    file = small_file()
    file["layers.0.q.lora_A.weight"] = torch.ones(2, 4)
    loaded = from_file(file, SMALL)
    assert loaded.unexpected == ["layers.0.q.lora_A.weight"]
    assert loaded.weights.adapters["layers.0.q"]["lora_A"].sum() == 0


def test_other_shapes_are_refused_or_left_out() -> None:
    file = small_file()
    key = "base_model.model.layers.0.q.lora_A.weight"
    file[key] = torch.zeros(2, 5)
    with pytest.raises(BaseMismatchError, match=r"1 tensors .*layers.0.q.lora_A.weight is \(2, 5\), expected \(2, 4\)"):
        from_file(file, SMALL)
    loaded = from_file(file, SMALL, ignore_mismatched=True)
    assert loaded.mismatched == [key]
    assert "lora_A" not in loaded.weights.adapters["layers.0.q"]


def test_optional_base_parameters_may_be_absent() -> None:
    expected = Expected(SMALL.adapters, optional={"embed.weight": (8, 4)})
    assert from_file(small_file(), expected).missing == []
    file = {**small_file(), "base_model.model.embed.weight": torch.zeros(8, 4)}
    loaded = from_file(file, expected)
    assert set(loaded.weights.base) == {"embed.weight"}
    assert loaded.unexpected == []


def test_an_adapted_module_inside_an_adapted_one() -> None:
    weights = AdapterWeights({"mha": {"lora_A": torch.zeros(1)}, "mha.out_proj": {"lora_A": torch.zeros(1)}})
    assert set(to_file(weights)) == {
        "base_model.model.mha.lora_A.weight",
        "base_model.model.mha.base_layer.out_proj.lora_A.weight",
    }


def test_a_method_without_an_entry_is_spelled_plainly() -> None:
    weights = AdapterWeights({"k": {"ia3_l": torch.zeros(4, 1)}})
    file = to_file(weights, peft_type="IA3")
    assert set(file) == {"base_model.model.k.ia3_l"}
    loaded = from_file(file, Expected({"k": {"ia3_l": (4, 1)}}), peft_type="IA3")
    assert loaded.weights.adapters["k"]["ia3_l"] is file["base_model.model.k.ia3_l"]


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), ["ia3_l"]),
        (peft.LoHaConfig(target_modules=["q_proj"]), ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]),
        (peft.LoKrConfig(target_modules=["q_proj"]), ["lokr_w1", "lokr_w2"]),
        (peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=8), ["boft_R", "boft_s"]),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), ["lora_A", "lora_B", "lora_E"]),
    ],
    ids=lambda value: getattr(value, "peft_type", None),
)
def test_other_methods_are_spelled_as_peft_spells_them(
    config: peft.PeftConfig, parameters: list[str], tmp_path: Path
) -> None:
    peft.get_peft_model(llama(num_hidden_layers=1), config).save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    weights = AdapterWeights({"model.layers.0.self_attn.q_proj": dict.fromkeys(parameters, torch.zeros(1))})
    assert to_file(weights, peft_type=peft.PeftType(config.peft_type).value).keys() == tensors.keys()


def test_thousands_of_strange_keys_are_looked_up_and_no_more() -> None:
    tried: list[str] = []
    tensors = {f"base_model.model.x.{number}.lora_A.weight": torch.zeros(1) for number in range(5000)}
    tensors["a." * 3000] = torch.zeros(1)
    tensors["base_model.model.q.lora_A.weight"] = torch.ones(2, 4)
    conversion = KeyConversion(lambda key: tried.append(key) or key, {})  # type: ignore[func-returns-value]
    loaded = from_file(tensors, Expected({"q": {"lora_A": (2, 4)}}), conversion=conversion)
    assert len(loaded.unexpected) == 5001 and len(tried) <= 1001
    assert torch.equal(loaded.weights.adapters["q"]["lora_A"], torch.ones(2, 4))


def test_keys_of_any_length_are_told_shortly() -> None:
    with pytest.raises(CheckpointError, match="nothing in the checkpoint fits") as caught:
        from_file({"a." * 50_000: torch.zeros(1)}, Expected({"q": {"lora_A": (2, 4)}}))
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize(("length", "is_hinted"), [(1000, True), (1001, False)])
def test_a_way_out_is_looked_for_in_keys_of_some_length(length: int, is_hinted: bool) -> None:
    ends = {key.removeprefix("base_model.model."): value for key, value in small_file().items()}
    file = {f"{'x' * (length - 1 - len(end))}.{end}": value for end, value in ends.items()}
    with pytest.raises(CheckpointError, match="nothing in the checkpoint fits") as caught:
        from_file(file, SMALL)
    assert bool(caught.value.details.get("key_mapping")) is is_hinted
