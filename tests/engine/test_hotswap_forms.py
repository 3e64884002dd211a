"""Hot-swapping into a slot whose tensors, or what its layers share, are of another form: refused, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nbpeft
from nbpeft.errors import HotSwapError
from nbpeft.model import PeftModel, get_peft_model, hotswap_adapter
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, randomize, same_state, state

DRAWN: dict[str, Any] = {"r": 4, "save_projection": False}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "deft-para": (
        *(nbpeft.DeftConfig, {"r": 4}, {"r": 4, "para": True}),
        r"has deft_R \(4, 32\) where the config of the new one requires nothing else; load",
    ),
    "para-deft": (
        *(nbpeft.DeftConfig, {"r": 4, "para": True, "decomposition_method": "relu"}),
        *({"r": 4}, r"has nothing else where the config of the new one requires deft_R \(4, 32\)"),
    ),
    "peanut-less": (nbpeft.PeanutConfig, {"r": 4, "depth": 2}, {"r": 4, "depth": 1}, r"has peanut_encoders\.1"),
    "peanut-more": (nbpeft.PeanutConfig, {"r": 4, "depth": 1}, {"r": 4, "depth": 2}, r"requires peanut_encoders\.1"),
    "glora-none": (nbpeft.GloraConfig, {"r": 4}, {"r": 4, "config_C": "none"}, "has glora_C_Xd"),
    "glora-more": (nbpeft.GloraConfig, {"r": 4, "config_C": "none"}, {"r": 4}, "requires glora_C_Xd"),
    "glora-vector": (nbpeft.GloraConfig, {"r": 4}, {"r": 4, "config_C": "vector"}, "requires glora_C_X"),
    "loha-rank": (nbpeft.LoHaConfig, {"r": 4}, {"r": 3}, r"has hada_w1_a \(32, 4\), .*requires hada_w1_a \(32, 3\)"),
    "vera-rank": (nbpeft.VeraConfig, DRAWN, {**DRAWN, "r": 3}, "r is 4 in adapter 'default' and 3 in the new one"),
    "vera-seed": (
        nbpeft.VeraConfig,
        DRAWN,
        {**DRAWN, "projection_prng_key": 5},
        "projection_prng_key is 0 in .* and 5",
    ),
    "pvera-seed": (nbpeft.PveraConfig, DRAWN, {**DRAWN, "projection_prng_key": 5}, "projection_prng_key is 0 in"),
    "vera-saved": (nbpeft.VeraConfig, {"r": 4}, DRAWN, "save_projection is True in adapter 'default' and False in"),
    "vera-narrow": (
        *(
            nbpeft.VeraConfig,
            {**DRAWN, "target_modules": ["q_proj", "down_proj"]},
            {**DRAWN, "target_modules": ["q_proj"]},
        ),
        "is not on the largest layers of 'default', so that its layers share tensors of other shapes",
    ),
    "randlora-sparse": (
        nbpeft.RandLoraConfig,
        DRAWN,
        {**DRAWN, "sparse": True},
        "sparse is False in adapter 'default'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_another_form_is_refused(case: str, tmp_path: Path) -> None:
    config_class, old, new, message = CASES[case]
    targets = {"target_modules": ["q_proj", "v_proj"]}
    model, other = (get_peft_model(llama(), config_class(**{**targets, **fields})).eval() for fields in (old, new))
    randomize(model, seed=1)
    randomize(other, seed=2)
    other.save_pretrained(tmp_path)
    before, output = state(model), logits(model)
    with pytest.raises(HotSwapError, match=message):
        hotswap_adapter(model, tmp_path, "default")
    assert same_state(before, state(model)) and torch.equal(logits(model), output)
    assert all(
        getattr(model.peft_config["default"], field) == value
        for field, value in old.items()
        if field != "target_modules"
    )
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(logits(again), logits(other))


def test_what_layers_share_is_not_taken_from_tensors_without_it() -> None:
    model = get_peft_model(llama(), nbpeft.VeraConfig(r=4, target_modules=["q_proj"]))
    tensors = {key: value for key, value in nbpeft.get_peft_model_state_dict(model).items() if "lambda" in key}
    with pytest.raises(
        HotSwapError, match="the new VeRA adapter has its own shared tensors, which a swap cannot replace: load it"
    ):
        nbpeft.hotswap_adapter_from_state_dict(model, tensors, "default", model.peft_config["default"])
