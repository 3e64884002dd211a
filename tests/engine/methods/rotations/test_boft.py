"""BOFT with several factors, for which peft needs a CUDA extension: its place is taken by plain torch here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, randomize

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "boft_block_size": 4}


def block_diagonals(rotations: Tensor) -> Tensor:
    return torch.stack([torch.block_diag(*factor) for factor in rotations])


@pytest.mark.parametrize("factors", [2, 3])
def test_several_factors_are_those_of_peft(factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = pytest.importorskip("peft.tuners.boft.layer")
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", SimpleNamespace(apply=block_diagonals))
    ours = get_peft_model(llama(), nbpeft.BOFTConfig(**TARGETS, boft_n_butterfly_factor=factors)).eval()
    randomize(ours, scale=0.3)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert (logits(ours) - logits(llama())).abs().max() > 1e-2
    assert_close(logits(theirs), logits(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(llama(), tmp_path / "theirs").eval()
    assert_close(logits(again), logits(ours))
    merged = logits(ours.merge_and_unload())
    assert_close(logits(theirs.merge_and_unload()), merged)


def test_dropout_leaves_some_blocks_of_one_factor_as_they_are() -> None:
    model = get_peft_model(llama(), nbpeft.BOFTConfig(**TARGETS, boft_dropout=0.5, init_weights=False))
    whole = logits(model.eval())
    torch.manual_seed(0)
    assert not torch.equal(logits(model.train()), whole)
    everything = get_peft_model(llama(), nbpeft.BOFTConfig(**TARGETS, boft_dropout=1.0)).train()
    randomize(everything, scale=0.1)
    with torch.no_grad():
        for name, parameter in everything.named_parameters():
            if "boft_s" in name:
                parameter.fill_(1)
    assert_close(logits(everything), logits(llama()))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"boft_block_size": 0}, "either boft_block_size or boft_block_num"),
        ({"boft_block_size": 5}, "must divide its 32 inputs"),
        ({"boft_n_butterfly_factor": 9}, r"a multiple of 2 \*\* 8"),
    ],
)
def test_impossible_blocks_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        get_peft_model(llama(), nbpeft.BOFTConfig(**TARGETS | fields))
