"""Status records: the values that PEFT gives for the same model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import nbpeft
from nbpeft.model import LoraConfig, LoraLayer, PeftModel, get_layer_status, get_model_status, get_peft_model
from tests.tiny_models import adapted, config

peft = pytest.importorskip("peft")


class Mixed(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(3, 4, 1)
        self.lin0, self.lin1 = nn.Linear(8, 8), nn.Linear(8, 2)
        self.conv1d = Conv1D(2, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(self.emb(ids)))


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["emb", "conv", "lin0", "conv1d"]},
    {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    {"target_modules": ["lin0", "lin1"], "use_dora": True},
]


def fields(records: list[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(record) for record in records]


def both(config: dict[str, Any], *others: dict[str, Any]) -> tuple[PeftModel, Any]:
    made = []
    for library in (nbpeft, peft):
        model = library.get_peft_model(Mixed(), library.LoraConfig(**config))
        for number, other in enumerate(others):
            model.add_adapter(f"other{number}", library.LoraConfig(**other))
        made.append(model)
    return made[0], made[1]


def assert_same(ours: PeftModel, theirs: Any) -> None:
    assert fields(ours.get_layer_status()) == fields(theirs.get_layer_status())
    assert fields([ours.get_model_status()]) == fields([theirs.get_model_status()])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("config", CONFIGS)
def test_records_are_those_of_peft(config: dict[str, Any]) -> None:
    ours, theirs = both(config, {"target_modules": ["lin0"], "r": 2})
    assert_same(ours, theirs)
    for model in (ours, theirs):
        model.set_adapter("other0")
    assert fields(ours.get_layer_status()) == fields(theirs.get_layer_status())
    for model in (ours, theirs):
        model.merge_adapter()
    assert fields(ours.get_layer_status()) == fields(theirs.get_layer_status())


def test_what_does_not_train_alike_is_irregular() -> None:
    ours, theirs = both({"target_modules": ["lin0", "lin1"]})
    for model in (ours, theirs):
        model.base_model.model.lin0.lora_A["default"].weight.requires_grad_(False)
    assert_same(ours, theirs)
    assert ours.get_model_status().requires_grad == {"default": "irregular"}


def test_disabled_adapters_are_told() -> None:
    ours, theirs = both({"target_modules": ["lin0"]})
    with ours.disable_adapter(), theirs.disable_adapter():
        assert ours.get_model_status().enabled is theirs.get_model_status().enabled is False


def test_rows_of_an_embedding_are_a_layer() -> None:
    ours, theirs = both({"target_modules": ["lin0"], "trainable_token_indices": {"emb": [1, 2]}})
    assert ours.get_layer_status()[0].name == "model.emb.token_adapter"
    assert fields(ours.get_layer_status()) == fields(theirs.get_layer_status())


def test_quantized_layers_tell_how_they_are_stored() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4"), bnb.nn.Linear8bitLt(64, 64)).to("cpu")
    model = get_peft_model(base, LoraConfig(target_modules=["0", "1"]))
    seen = [(record.module_type, record.quantization_backend) for record in model.get_layer_status()]
    assert seen == [("lora.Linear4bit", "bnb 4bit"), ("lora.Linear8bitLt", "bnb 8bit")]
    assert model.get_model_status().quantization_backend == "irregular"
    layers: Any = model.base_model.model
    kinds = peft.utils.quantization_utils
    for layer, kind in zip(layers, (kinds.Bnb4bitBackend, kinds.Bnb8bitBackend), strict=True):
        assert layer.quantization_backend.backend_name == kind.backend_name
        own = getattr(nbpeft.utils.quantization_utils, kind.__name__)
        assert isinstance(layer.quantization_backend, own)
        assert nbpeft.utils.resolve_quantization_backend(layer.get_base_layer()) is layer.quantization_backend
        assert f"quantization_backend='{kind.backend_name}'" in repr(layer)
    dense: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert dense.base_model.model[0].quantization_backend is None
    dense.base_model.model[0].quantization_backend = nbpeft.utils.quantization_utils.Bnb8bitBackend()
    assert dense.get_model_status().quantization_backend == "bnb 8bit"
    dense.base_model.model[0].quantization_backend = None
    assert dense.get_model_status().quantization_backend is None


def test_a_base_model_with_adapters_has_names_of_its_own() -> None:
    ours, theirs = both({"target_modules": ["lin0"]})
    base = ours.get_base_model()
    assert fields(get_layer_status(base)) == fields(peft.get_layer_status(theirs.base_model.model))
    assert fields([get_model_status(base)]) == fields([peft.get_model_status(theirs.base_model.model)])


def test_layers_that_differ_make_the_model_irregular() -> None:
    model = adapted()
    model.add_adapter("other", config())
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert model.get_model_status().enabled is True
    layers[0].enable_adapters(False)
    assert [status.enabled for status in model.get_layer_status()] == [False, *[True] * (len(layers) - 1)]
    assert model.get_model_status().enabled == "irregular"
    layers[0].enable_adapters(True)
    layers[0].set_adapter("other")
    assert model.get_model_status().active_adapters == "irregular"
    assert model.get_layer_status()[0].active_adapters == ["other"]
    model.set_adapter("default")
    assert model.get_model_status().active_adapters == ["default"]
    layers[0].merge()
    assert model.get_model_status().merged_adapters == "irregular"
    layers[0].unmerge()
    assert model.get_model_status().merged_adapters == []


def test_the_config_of_a_base_model_is_a_dictionary() -> None:
    model = adapted()
    assert model.base_model.get_model_config(model)["model_type"] == "llama"
    assert model.base_model.get_model_config(nn.Linear(1, 1)) == {"model_type": "custom"}
