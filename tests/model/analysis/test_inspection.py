"""Where an adapter changed a model, against dense algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nbpeft.errors import MergeError, UnknownAdapterError
from nbpeft.model import LoraConfig, get_peft_model
from nbpeft.model.analysis.inspection import inspect_adapter
from nbpeft.state import LayerChange
from tests.closeness import assert_close


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.first = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.first(self.conv(self.embed(ids).mT).mT))


def adapted(**fields: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, **fields)
    return get_peft_model(Net(), config)


def by_path(model: Any, name: str = "default") -> dict[str, LayerChange]:
    return {layer.path: layer for layer in inspect_adapter(model.manager, name)}


@pytest.mark.parametrize("dora", [False, True])
def test_norms_are_those_of_the_merged_difference(dora: bool) -> None:
    model = adapted(target_modules=["embed", "conv", "first"], use_dora=dora)
    model.manager.set_scale("default", -0.5)
    found = by_path(model)
    before = {name: value.clone() for name, value in Net.state_dict(model.get_base_model()).items()}
    merged = model.merge_and_unload().state_dict()
    assert set(found) == {"embed", "conv", "first"}
    for path, layer in found.items():
        frozen = before[f"{path}.base_layer.weight"]
        change = merged[f"{path}.weight"] - frozen
        assert_close(layer.delta_norm, float(change.norm()))
        assert_close(layer.weight_norm, float(frozen.norm()))
        assert layer.relative == pytest.approx(layer.delta_norm / layer.weight_norm)
        assert layer.rank == 4


def test_directions_hold_nine_tenths_of_the_energy() -> None:
    model = adapted(target_modules=["first"])
    lora_A, lora_B = model.manager.layers["first"].adapter("default").factors
    values = torch.linalg.svdvals(lora_B @ lora_A).square()
    shares = values.cumsum(0) / values.sum()
    expected = next(count for count, share in enumerate(shares.tolist(), start=1) if share >= 0.9)
    assert by_path(model)["first"].directions == expected
    with torch.no_grad():
        lora_B[:, 1:] = 0
    assert by_path(model)["first"].directions == 1
    with torch.no_grad():
        lora_B.zero_()
    assert (by_path(model)["first"].directions, by_path(model)["first"].relative) == (0, 0.0)


def test_a_module_trained_as_a_whole_is_compared_with_the_original() -> None:
    model = adapted(target_modules=["first"], modules_to_save=["head"])
    assert by_path(model)["head"].delta_norm == 0
    copied = model.manager.copies["head"].modules_to_save._modules["default"]
    with torch.no_grad():
        copied.weight[0, 0] += 3.0
        copied.bias[1] -= 4.0
    assert_close(by_path(model)["head"].delta_norm, 5.0)
    assert by_path(model)["head"].rank is None


def test_it_refuses_merged_weights_and_unknown_names() -> None:
    model = adapted(target_modules=["first"])
    with pytest.raises(UnknownAdapterError, match="'defalt' not found"):
        inspect_adapter(model.manager, "defalt")
    model.merge_adapter()
    with pytest.raises(MergeError, match="'default' merged: unmerge before inspecting"):
        inspect_adapter(model.manager, "default")


def test_a_quantized_weight_is_read(tiny_4bit: Any) -> None:
    found = inspect_adapter(tiny_4bit.manager, "default")
    assert found and all(layer.weight_norm > 0 and layer.relative > 0 for layer in found)


@pytest.fixture
def tiny_4bit() -> Any:
    from nbpeft.model.quantization.quantize import quantize_model
    from tests.tiny_models import llama

    base = quantize_model(llama())
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
