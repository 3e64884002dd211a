"""Fields of configs have the type they are declared with; no truth value and no number is guessed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import ConfigError, ConfigTypeError


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("use_dora", "no", "True or False"),
        ("use_rslora", "false", "True or False"),
        ("fan_in_fan_out", 1, "True or False"),
        ("lora_bias", [], "True or False"),
        ("inference_mode", "yes", "True or False"),
        ("r", "8", "a positive whole number"),
        ("lora_alpha", True, "a number"),
        ("lora_dropout", "0.1", "a number"),
        ("layers_to_transform", [[1]], "a list of whole numbers or a whole number"),
        ("layers_to_transform", 1.5, "a list of whole numbers or a whole number"),
        ("trainable_token_indices", {"embed": True}, "a list of whole numbers or a dictionary"),
        ("target_modules", {"q_proj": 1}, "a name pattern or a list of names"),
        ("base_model_name_or_path", 3, "a text"),
        ("auto_mapping", 3, "a dictionary"),
        ("revision", ["main"], "a text"),
        ("task_type", 5, "a text"),
        ("init_lora_weights", 1, "True or False or a text"),
    ],
)
def test_another_type_is_refused_with_its_field(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{name: value})
    assert str(caught.value).startswith(f"{name} must be {expected}, not {value!r:.20}")


def test_a_key_that_is_no_name_is_told_apart_from_the_value() -> None:
    with pytest.raises(ConfigError, match=r"^a key of rank_pattern must be a text, not 3$"):
        LoraConfig(rank_pattern={3: 8})  # type: ignore[dict-item]


@pytest.mark.parametrize("fields", [{"target_parameters": "weight"}, {"kasa_config": 123}])
def test_another_type_where_peft_raises_a_type_error_raises_one(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        peft.LoraConfig(**fields)
    with pytest.raises(ConfigTypeError) as caught:
        LoraConfig(**fields)
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "q", "exclude_modules": ("a", "b")},
        {"target_modules": {"q", "v"}, "modules_to_save": ("x",)},
        {"target_modules": (name for name in ("q", "v"))},
        {"layers_to_transform": range(3), "layers_pattern": ["layers"]},
        {"trainable_token_indices": {"embed": [1, 2]}},
        {"init_lora_weights": "gaussian", "lora_dropout": 1},
        {"rank_pattern": None, "alpha_pattern": None, "loftq_config": None, "use_dora": None},
        {"base_model_name_or_path": Path("/models/x")},
        {"alpha_pattern": {"q": 1, "v": 2.5}},
    ],
)
def test_what_users_write_passes(fields: dict[str, Any]) -> None:
    made = LoraConfig(**fields)
    assert fields.keys() <= made.to_dict().keys()
    for name in fields.keys() & {"alpha_pattern", "trainable_token_indices", "init_lora_weights"}:
        assert getattr(made, name) == (fields[name] or {})


def test_tensors_of_one_number_become_pythons() -> None:
    pattern = {"q": torch.tensor(4.0), "v": 2}
    made = LoraConfig(lora_alpha=torch.tensor(8.0), use_rslora=torch.tensor(True), alpha_pattern=pattern)  # type: ignore[arg-type]
    assert (made.lora_alpha, made.use_rslora, made.alpha_pattern) == (8.0, True, {"q": 4.0, "v": 2})
    assert type(made.lora_alpha) is float and isinstance(pattern["q"], torch.Tensor)
    with pytest.raises(ConfigError, match="lora_alpha must be a number"):
        LoraConfig(lora_alpha=torch.ones(2))  # type: ignore[arg-type]


def test_numbers_of_numpy_become_pythons() -> None:
    made = LoraConfig(r=np.int64(4), lora_alpha=np.float32(8), use_rslora=np.bool_(True))
    assert [type(value) for value in (made.r, made.lora_alpha, made.use_rslora)] == [int, float, bool]


@pytest.mark.parametrize(("name", "digits"), [("r", 5000), ("lora_alpha", 400), ("lora_alpha", 5000)])
def test_numbers_beyond_writing_are_refused_shortly(name: str, digits: int) -> None:
    fields: dict[str, Any] = {name: 10**digits}
    with pytest.raises(ConfigError, match=f"^{name} must be") as caught:
        LoraConfig(**fields)
    assert len(str(caught.value)) < 150


def test_iterations_are_bounded() -> None:
    assert LoraConfig(init_lora_weights="pissa_niter_128").pissa_iterations == 128
    for many in ("pissa_niter_129", "pissa_niter_99999999999", "pissa_niter_" + "9" * 5000):
        with pytest.raises(ConfigError, match="at most pissa_niter_128") as caught:
            LoraConfig(init_lora_weights=many)
        assert len(str(caught.value)) < 300


def test_configs_of_other_packages_are_asked_too() -> None:
    @dataclass
    class Other(AdapterConfig):
        keep: bool = field(default=True)
        anything: Any = field(default=None)

    assert Other(anything=object()).keep
    with pytest.raises(ConfigError, match="keep must be True or False, not 'no'"):
        Other(keep="no")  # type: ignore[arg-type]
