"""RandLoRA's bases against peft's: drawn from the same seed, whatever their kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import nbpeft
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, logits

TARGETS = {"target_modules": ["q_proj", "down_proj", "up_proj"], "r": 5}


@pytest.mark.parametrize("fields", [{}, {"sparse": True}, {"very_sparse": True}, {"projection_prng_key": 3}])
def test_bases_are_those_of_peft(fields: dict[str, Any]) -> None:
    shared = get_peft_model(llama(), nbpeft.RandLoraConfig(**TARGETS | fields)).manager.shared("default")
    theirs = peft.get_peft_model(llama(), peft.RandLoraConfig(**TARGETS | fields)).base_model
    assert shared is not None
    for name in ("randlora_A", "randlora_B"):
        assert torch.equal(getattr(shared, name), getattr(theirs, name)["default"].float()), name


def test_what_peft_writes_once_more_for_each_layer_is_passed_over(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    theirs = peft.get_peft_model(llama(), peft.RandLoraConfig(**TARGETS, init_weights=False))
    theirs.save_pretrained(tmp_path)
    recwarn.clear()
    ours = PeftModel.from_pretrained(llama(), tmp_path)
    assert not [str(one.message) for one in recwarn if "randlora" in str(one.message)]
    assert_close(logits(ours), logits(theirs.eval()))
    keys = nbpeft.get_peft_model_state_dict(ours)
    plain = nbpeft.inject_adapter_in_model(nbpeft.RandLoraConfig(**TARGETS), llama(), state_dict=keys)
    assert nbpeft.get_peft_model_state_dict(plain).keys() == {key.removeprefix("base_model.model.") for key in keys}
