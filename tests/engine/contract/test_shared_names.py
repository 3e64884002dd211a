"""Tensors that the layers of an adapter share, in state dicts of whole models: under PEFT's names, in each layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

import nbpeft
from nbpeft.engine.contract.shared_state import state_of_all
from tests.closeness import assert_close


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("VeraConfig", {"r": 4, "init_weights": False}),
    "vera drawn": ("VeraConfig", {"r": 4, "save_projection": False}),
    "pvera": ("PveraConfig", {"r": 4, "init_weights": False}),
    "randlora": ("RandLoraConfig", {"r": 2, "init_weights": False}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 2, "topk": 2}),
    "unilora": ("UniLoraConfig", {"r": 2, "theta_d_length": 8}),
    "unilora saved": ("UniLoraConfig", {"r": 2, "theta_d_length": 8, "save_indices": True}),
    "tinylora": ("TinyLoraConfig", {"r": 2, "u": 4}),
    "tinylora drawn": ("TinyLoraConfig", {"r": 2, "u": 4, "save_projection": False}),
}


def model_of(library: Any, name: str, seed: int) -> Any:
    kind, fields = CONFIGS[name]
    torch.manual_seed(seed)
    base = Net()
    torch.manual_seed(0)
    configs = [getattr(library, kind)(target_modules=["first", "second"], **copy.deepcopy(fields)) for _ in range(2)]
    model = library.get_peft_model(base, configs[0])
    model.add_adapter("other", configs[1])
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_state_dicts_are_pefts(name: str) -> None:
    ours, theirs = model_of(nbpeft, name, 0), model_of(peft, name, 0)
    # The projections of the second adapter are those of the first in PEFT, and listed once.
    buffers = ({key for key, _ in model.named_buffers() if not key.endswith(".other")} for model in (ours, theirs))
    assert next(buffers) == next(buffers)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    others = model_of(nbpeft, name, 1), model_of(peft, name, 1)
    for other, given in zip(others, (theirs, ours), strict=True):
        other.load_state_dict(given.state_dict())
        assert_close(other.state_dict(), dict(given.state_dict()))


def test_one_of_the_copies_in_a_state_dict_is_enough() -> None:
    # accelerate and safetensors keep the copy whose name comes first, which need not be that of the first layer.
    model = model_of(nbpeft, "vblora", 0)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    kept = "base_model.model.second.vblora_vector_bank.default"
    changed = {key: value for key, value in tensors.items() if "bank.default" not in key} | {kept: tensors[kept] + 1}
    assert "base_model.model.second.vblora_vector_bank.default" not in dict(model.named_parameters())
    missing = model.load_state_dict(changed, strict=False).missing_keys
    assert set(missing) == {f"base_model.{path}vblora_vector_bank.default" for path in ("", "model.first.")}
    assert_close(model.base_model.vblora_vector_bank["default"], tensors[kept] + 1)


def test_safetensors_saves_and_loads_whole_models(tmp_path: Path) -> None:
    model, other = model_of(nbpeft, "vera", 0), model_of(nbpeft, "vera", 1)
    save_model(model, str(tmp_path / "model.safetensors"))
    missing, unexpected = load_model(other, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    assert_close(other.state_dict(), dict(model.state_dict()))


def test_wrong_shapes_of_shared_tensors_are_reported() -> None:
    model = model_of(nbpeft, "vblora", 0)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = {**tensors, "base_model.model.second.vblora_vector_bank.default": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"second\.vblora_vector_bank"):
        model.load_state_dict(wrong)


def test_the_state_stays_with_the_model_when_its_first_layer_loses_the_adapter() -> None:
    model = model_of(nbpeft, "vera", 0)
    layer = model.base_model.model.first
    assert state_of_all(layer.adapter("default")) is state_of_all(model.base_model.model.second.adapter("default"))
    with pytest.warns(UserWarning, match="active adapter"):
        layer.delete_adapter("default")
    names = {key for key, _ in model.named_buffers() if key.endswith(".default")}
    assert names == {f"base_model.model.second.vera_{side}.default" for side in "AB"}
