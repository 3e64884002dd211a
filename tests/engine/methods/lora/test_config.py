from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import peft
import pytest
from torch import nn

import nbpeft
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.init_configs import INIT_CONFIGS
from nbpeft.engine.methods.lora.variant_configs import VARIANT_CONFIGS
from nbpeft.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 2**70, "r must be a positive whole number of at most 16,777,216"),
        ("r", 10**10, "r must be a positive whole number of at most 16,777,216"),
        ("lora_dropout", 3, "lora_dropout must be between 0 and 1"),
        ("bias", "al", "Did you mean 'all'"),
        ("task_type", "CAUSAL", "Did you mean 'CAUSAL_LM'"),
        ("init_lora_weights", "pizza", "not implemented"),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj'] must be a positive whole number, not 0"),
        ("rank_pattern", {"(": 3}, "rank_pattern is not a regular expression"),
        ("rank_pattern", ["a"], "rank_pattern must be a dictionary, not ['a']"),
        ("alpha_pattern", {"(": 3.0}, "alpha_pattern is not a regular expression"),
        ("alpha_pattern", {"q": "x"}, "alpha_pattern['q'] must be a number, not 'x'"),
        ("target_modules", 5, "target_modules must be a name pattern or a list of names, not 5"),
        ("target_modules", b"q_proj", "not b'q_proj'"),
        ("target_modules", "[", "target_modules is not a regular expression"),
        ("exclude_modules", "[", "exclude_modules is not a regular expression"),
        ("exclude_modules", 3, "exclude_modules must be a name pattern or a list of names, not 3"),
        ("modules_to_save", 3, "modules_to_save must be a name pattern or a list of names, not 3"),
    ],
)
def test_an_impossible_value_is_told_with_its_field(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as failure:
        LoraConfig(**{field: value})
    assert message in str(failure.value) and "\n" not in str(failure.value)
    assert failure.value.details["field"] == field


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (nbpeft.LoftQConfig, "loftq_bits", 3),
        (nbpeft.CordaConfig, "corda_method", "x"),
        (nbpeft.LoraGAConfig, "direction", "x"),
        (nbpeft.LoraGAConfig, "scale", "x"),
        (nbpeft.LoraGAConfig, "stable_gamma", 0),
        (nbpeft.EvaConfig, "rho", 0.5),
        (nbpeft.EvaConfig, "tau", 1.5),
        (nbpeft.EvaConfig, "whiten", 3),
    ],
)
def test_what_an_initialisation_cannot_do_is_refused_with_its_field(config: Any, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}`? must be .*(not|is) {value!r}"):
        config(**{field: value})


def test_no_redistribution_of_ranks_is_a_setting_of_eva() -> None:
    assert nbpeft.EvaConfig(rho=1.0).rho == 1.0


@pytest.mark.parametrize("config", [*VARIANT_CONFIGS.values(), *(config for _, config in INIT_CONFIGS.values())])
def test_settings_within_a_config_start_as_in_peft(config: Any) -> None:
    theirs = getattr(peft, config.__name__, None) or getattr(peft.tuners.lora.config, config.__name__)
    ours, theirs = ({field.name: field.default for field in dataclasses.fields(one)} for one in (config, theirs))
    assert ours == theirs


@pytest.mark.parametrize(
    ("fields", "rank"), [({"r": 64}, 16), ({"r": 9}, 4), ({"r": 4}, None), ({"r": 64, "rank_pattern": {"q": 2}}, None)]
)
def test_a_smaller_adapter_has_a_quarter_of_the_rank(fields: dict[str, Any], rank: int | None) -> None:
    config = LoraConfig(**fields)
    smaller = method_of(config).listing.smaller(config)
    assert (smaller.r if smaller else None) == rank


def test_a_pattern_of_layers_is_a_name_or_names() -> None:
    with pytest.raises(ConfigError, match="layers_pattern must be a name pattern or a list of names, not 3"):
        LoraConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern=3)


def test_registered_layer_classes_are_copied_and_not_saved() -> None:
    config = LoraConfig()
    config._register_custom_module({nn.LSTM: nn.Module})
    config._register_custom_module({nn.Linear: nn.Identity})
    assert config.copy().custom_layer_class(nn.LSTM(1, 1)) is nn.Module
    assert config.custom_layer_class(nn.Linear(1, 1)) is nn.Identity
    assert LoraConfig().custom_layer_class(nn.LSTM(1, 1)) is None and "_custom_modules" not in config.to_dict()
    assert LoraConfig.check_kwargs(r=3) == {"r": 3}


@pytest.mark.parametrize("changes", [{}, {"use_rslora": False}, {"rank_pattern": {}}, {"init_lora_weights": True}])
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_3"])
def test_what_cannot_be_converted_later_is_warned_of_as_in_peft(init: str, changes: dict[str, Any]) -> None:
    fields = {"init_lora_weights": init, "use_rslora": True, "rank_pattern": {"a": 2}, **changes}
    found = []
    for library in (nbpeft, peft):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            library.LoraConfig(target_modules=["a"], **fields)
        found.append([str(one.message).partition(" post-training")[0] for one in warned])
    assert found[0] == found[1] and len(found[0]) == (not changes)
