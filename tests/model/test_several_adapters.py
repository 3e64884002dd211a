"""Several adapters on one model where peft and its users expect something definite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft.errors import AdapterError, LayerKindError, MergeError
from nbpeft.model import LoraConfig, get_peft_model
from tests.closeness import differ
from tests.tiny_models import adapted, classifier, config, logits, state, tokens


def three() -> Any:
    torch.manual_seed(1)
    model = adapted(name="one")
    model.add_adapter("two", config(use_dora=True))
    model.add_adapter("three", config(r=2))
    return model.eval()


def test_merging_one_after_the_other_is_merging_them_together() -> None:
    model = three()
    before = state(model)
    model.merge_adapter(["one", "two"])
    together, merged = logits(model), state(model)
    model.unmerge_adapter()
    for name in ("one", "two"):
        model.merge_adapter([name])
    assert model.manager.merged == ("one", "two") and torch.equal(logits(model), together)
    assert all(torch.equal(value, merged[key]) for key, value in state(model).items())
    model.unmerge_adapter()
    after = state(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_merge_that_fails_leaves_what_was_merged() -> None:
    model = three()
    model.merge_adapter(["one"])
    before, output = state(model), logits(model)
    next(p for name, p in model.named_parameters() if ".lora_A.three" in name).data[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(MergeError, match="NaNs detected"):
        model.merge_adapter(["three"], safe_merge=True)
    assert model.manager.merged == ("one",) and torch.equal(logits(model), output)
    after = state(model)
    assert all(torch.equal(value.nan_to_num(), after[key].nan_to_num()) for key, value in before.items())


def test_two_copies_of_one_module_cannot_act_together() -> None:
    model = get_peft_model(classifier(), config(modules_to_save=["score"]), "one").eval()
    model.add_adapter("two", config(modules_to_save=["score"]))
    before = logits(model)
    for command in (model.set_adapter, model.merge_adapter):
        with pytest.raises(ValueError, match="'one' and 'two' each trained their own copy of score"):
            command(["one", "two"])
    assert model.active_adapters == ["one"] and not model.manager.merged
    assert torch.equal(logits(model), before)


def test_disabled_adapters_serve_no_row() -> None:
    model = three()
    with model.disable_adapter(), torch.no_grad():
        expected = model(input_ids=tokens()).logits
        assert torch.equal(model(input_ids=tokens(), adapter_names=["one", "two"]).logits, expected)
        with pytest.raises(AdapterError, match="3 names for 2 rows"):
            model(input_ids=tokens(), adapter_names=["one", "two", "one"])
    with torch.no_grad():
        assert differ(model(input_ids=tokens(), adapter_names=["one", "two"]).logits, expected)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_another_adapter_leaves_what_trains_as_it_was() -> None:
    model = adapted(bias="all")
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.base_layer.weight.requires_grad_(True)
    layer.lora_A["default"].weight.requires_grad_(False)
    before = trainable(model)
    assert any(name.endswith("q_proj.base_layer.bias") for name in before)
    model.add_adapter("other", config(target_modules=["q_proj", "o_proj"]))
    after = {name.replace("o_proj.base_layer.", "o_proj.") for name in trainable(model)}
    assert after == {name.replace("o_proj.base_layer.", "o_proj.") for name in before}


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.pair = nn.Sequential(nn.Linear(4, 4), Pair())

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.first(x))[0]


def test_a_copied_module_without_a_single_output_cannot_be_mixed() -> None:
    model = get_peft_model(Model(), LoraConfig(target_modules=["first"], modules_to_save=["pair"])).eval()
    x = torch.ones(2, 4)
    assert model(x).shape == (2, 4)
    with pytest.raises(LayerKindError, match="is not supported for a Sequential trained as a whole"):
        model(x, adapter_names=["default", "__base__"])
