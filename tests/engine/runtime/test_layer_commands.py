"""``update_layer`` on one adapted layer: as peft does it, and then in the files, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import nbpeft
from nbpeft.errors import ConfigError, MergeError
from nbpeft.model import LoraConfig, PeftModel, get_peft_model
from tests.closeness import assert_close, differ
from tests.tiny_models import llama, logits, randomize

BATCH = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.table = nn.Linear(6, 8), nn.Linear(8, 5), nn.Embedding(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x)) + self.table(torch.tensor([1, 2, 3]))  # type: ignore[no-any-return]


def adapted(library: Any = nbpeft, **fields: Any) -> tuple[Any, Any]:
    """A model and its layer lin0."""
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["lin0", "lin1", "table"], "init_lora_weights": False}
    model = library.get_peft_model(Net(), library.LoraConfig(**{**settings, **fields})).eval()
    return model, model.base_model.model.lin0


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(BATCH)  # type: ignore[no-any-return]


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_gets_another_rank_on_a_layer_as_in_peft(rslora: bool) -> None:
    shown = []
    for library in (peft, nbpeft):
        model, layer = adapted(library)
        layer.update_layer("default", 5, 10, config=library.LoraConfig(use_rslora=rslora, lora_dropout=0.1))
        shown.append(
            (
                *(tuple(factor["default"].weight.shape) for factor in (layer.lora_A, layer.lora_B)),
                *(dict(layer.r), dict(layer.scaling), dict(layer.lora_alpha), dict(layer.use_rslora)),
                *(layer.lora_dropout["default"].p, layer.lora_A["default"].weight.requires_grad),
                bool(layer.lora_B["default"].weight.any()),
                sorted(name for name, one in model.named_parameters() if one.requires_grad),
            )
        )
    assert shown[0] == shown[1]


def test_what_is_saved_then_loads_here_and_in_peft(tmp_path: Path) -> None:
    model, layer = adapted()
    layer.update_layer("default", 5, 10, config=LoraConfig(init_lora_weights=False, use_rslora=True))
    before = output(model)
    assert model.peft_config["default"].rank_pattern == {"^lin0": 5}
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert_close(output(PeftModel.from_pretrained(Net(), tmp_path).eval()), before)
    torch.manual_seed(0)
    assert_close(output(peft.PeftModel.from_pretrained(Net(), tmp_path).eval()), before)


def test_an_embedding_takes_another_rank_too() -> None:
    model, _ = adapted()
    table = model.base_model.model.table
    table.update_layer("default", 3, 3, LoraConfig())
    assert table.lora_embedding_A["default"].shape == (3, 7) and table.scaling == {"default": 1.0}


def test_an_unknown_adapter_is_added_to_the_layer_alone() -> None:
    model, layer = adapted()
    before = output(model)
    layer.update_layer("other", 3, 6, config=LoraConfig(init_lora_weights=False, modules_to_save=["lin1"]))
    assert [*layer.r] == ["default", "other"] and [*model.base_model.model.lin1.r] == ["default"]
    assert torch.equal(output(model), before) and model.active_adapters == ["default"]
    model.set_adapter("other")
    assert differ(output(model), before)
    model.base_model.model.lin1.update_layer("other", 3, 6, config=LoraConfig())
    assert model.peft_config["other"].target_modules == "(?:lin0)|lin1" and layer.r["other"] == 3
    model.delete_adapter("other")
    assert torch.equal(output(model), before)


@pytest.mark.parametrize(("count", "active"), [(1, ["default"]), (3, ["other"])])
def test_a_choice_of_single_layers_is_the_model_s_once_all_agree(count: int, active: list[str]) -> None:
    model, _ = adapted()
    fields = {"target_modules": ["lin0", "lin1", "table"], "init_lora_weights": False}
    model.add_adapter("other", LoraConfig(r=2, **fields))
    layers = list(model.manager.layers.values())
    assert len(layers) == 3
    for layer in layers[:count]:
        layer.set_adapter("other")
    with model.disable_adapter():
        pass
    assert model.active_adapters == active and {tuple(layer.active_adapters) for layer in layers} == {tuple(active)}


def test_what_a_file_could_not_hold_is_refused_and_nothing_changes() -> None:
    model, layer = adapted()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="`r` should be a positive integer value but the value passed is 0"):
        layer.update_layer("default", 0, 4, config=LoraConfig())
    with pytest.raises(ConfigError, match="update_layer takes a LoraConfig, not a dict"):
        layer.update_layer("default", 2, 4, config={})
    with pytest.raises(ConfigError, match="adapter 'default' is LoRA, not DoRA"):
        layer.update_layer("default", 2, 4, config=LoraConfig(use_dora=True))
    with pytest.raises(ConfigError, match="lora_bias must be the adapter's own, False"):
        layer.update_layer("default", 2, 4, config=LoraConfig(lora_bias=True))
    with pytest.raises(ConfigError, match="init_lora_weights must be the adapter's own, False"):
        layer.update_layer("default", 2, 4, config=LoraConfig(init_lora_weights="olora"))
    model.merge_adapter()
    with pytest.raises(MergeError, match="'default' merged: unmerge before 'default' is changed on a layer"):
        layer.update_layer("default", 2, 4, config=LoraConfig())
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.peft_config["default"].rank_pattern == {}


def test_a_target_that_names_other_layers_too_is_refused() -> None:
    base = nn.ModuleDict({"lin": nn.Linear(4, 4), "inner": nn.ModuleDict({"lin": nn.Linear(4, 4)})})
    base["inner"]["other"] = nn.Linear(4, 4)  # type: ignore[index]
    model: Any = get_peft_model(base, LoraConfig(target_modules=["other"]))
    model.add_adapter("all", LoraConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match="lin cannot be added to the targets of 'default' alone"):
        base["lin"].update_layer("default", 2, 4, config=LoraConfig())  # type: ignore[operator]
    assert [*base["lin"].r] == ["all"]  # type: ignore[misc]


SHARING: list[tuple[Any, dict[str, Any]]] = [
    (nbpeft.UniLoraConfig, {"theta_d_length": 20}),
    (nbpeft.TinyLoraConfig, {"u": 4}),
    (nbpeft.VeraConfig, {"r": 4}),
    (nbpeft.PveraConfig, {"r": 4}),
    (nbpeft.VBLoRAConfig, {"num_vectors": 8, "vector_length": 4, "topk": 2}),
    (nbpeft.RandLoraConfig, {"r": 4}),
]


@pytest.mark.parametrize(("config_class", "fields"), SHARING)
def test_what_layers_share_outlives_the_first_of_them(
    config_class: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    config = config_class(target_modules=["q_proj", "v_proj"], **fields)
    model: Any = get_peft_model(llama(), config).eval()
    randomize(model)
    manager = model.manager
    shared, first = manager.shared("default"), list(manager.layers.values())[:2]
    own = {id(one) for layer in first for one in layer.adapter("default")._parameters.values()}
    kept = [id(one) for one in manager.parameters("default") if id(one) not in own]
    model.save_pretrained(tmp_path / "before")
    for layer in first:
        layer.delete_adapter("default")
    assert manager.shared("default") is shared
    assert sorted(id(one) for one in manager.parameters("default")) == sorted(kept)
    expected = logits(model)
    assert differ(expected, logits(llama()))
    model.save_pretrained(tmp_path / "after")
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("before", "after")]
    assert {key for key in files[0] if "layers.0" not in key} == files[1].keys()
    model.double()
    assert {one.dtype for one in manager.parameters("default")} == {torch.float64}
    assert_close(logits(model).float(), expected)


def test_a_deletion_that_fails_leaves_what_layers_share_where_it_was() -> None:
    model: Any = get_peft_model(llama(), nbpeft.UniLoraConfig(theta_d_length=20, target_modules=["q_proj"]))
    first, second = model.manager.layers.values()
    with pytest.raises(RuntimeError, match="later"), model.manager.transaction():
        first.delete_adapter("default")
        assert "shared" in second.adapter("default")._modules
        raise RuntimeError("later")
    assert "shared" in first.adapter("default")._modules and not second.adapter("default")._modules
    assert [tuple(one.shape) for one in model.manager.parameters("default")] == [(20,)]


def test_a_deleted_adapter_is_no_longer_listed_below_its_layer() -> None:
    model, layer = adapted()
    model.add_adapter("other", nbpeft.LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    assert list(layer.lora_A) == ["default", "other"]
    layer.delete_adapter("other")
    assert {*layer._modules["lora_A"]._modules} == {"default"}


def test_where_one_layer_lost_the_adapter_another_takes_another_rank() -> None:
    model, layer = adapted()
    model.base_model.model.lin1.delete_adapter("default")
    layer.update_layer("default", 5, 10, config=LoraConfig())
    assert layer.r == {"default": 5} and model.peft_config["default"].rank_pattern == {"^lin0": 5}
