"""State dicts of whole models, in the spelling here and in PEFT's, are read like a file."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import nbpeft
from nbpeft.checkpoint import is_of_a_model, keys_of_a_file
from nbpeft.errors import CheckpointError
from tests.closeness import assert_close, differ


class Small(nn.Module):
    """An embedding, a layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.linear(self.embed(ids)))
        return out


def adapted(library: Any, seed: int, name: str = "default", **changes: Any) -> Any:
    fields: dict[str, Any] = {"target_modules": ["linear", "embed"], "modules_to_save": ["head"], "lora_bias": False}
    config = library.LoraConfig(init_lora_weights=False, **(fields | changes))
    model = library.get_peft_model(Small(), config, adapter_name=name)
    torch.manual_seed(seed)
    for part in model.parameters():
        if part.requires_grad:
            part.data.normal_()
    return model.eval()


# PEFT itself mistakes the names "lora" and "weight" for parts of its keys.
@pytest.mark.parametrize(
    ("source", "name"),
    [(peft, "default"), (peft, "model"), *((nbpeft, name) for name in ("default", "model", "lora", "weight"))],
)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"target_modules": ["linear"], "lora_bias": True}])
def test_a_model_takes_the_state_dict_of_another(source: Any, changes: dict[str, Any], name: str) -> None:
    theirs, ours = adapted(source, 1, name, **changes), adapted(nbpeft, 2, name, **changes)
    ids = torch.arange(10)
    assert differ(theirs(ids), ours(ids))
    loaded = nbpeft.set_peft_model_state_dict(ours, theirs.state_dict(), name)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    assert_close(ours(ids), theirs(ids))


def test_only_what_names_the_adapter_is_read() -> None:
    ours, other = adapted(nbpeft, 2, "mine"), adapted(nbpeft, 1, "mine2")
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    with pytest.raises(CheckpointError, match="nothing"):
        nbpeft.set_peft_model_state_dict(
            ours, {key: value for key, value in other.state_dict().items() if "mine2" in key}, "mine"
        )
    assert all(torch.equal(before[key], tensor) for key, tensor in ours.state_dict().items())


def test_keys_of_a_file_stay_as_they_are() -> None:
    ours = adapted(nbpeft, 2, "weight", use_dora=True)
    tensors = nbpeft.get_peft_model_state_dict(ours, adapter_name="weight")
    assert not is_of_a_model(tensors, "weight", "LORA")
    assert keys_of_a_file(tensors, "weight", "LORA") == tensors
