"""PEFT's layer classes called without a model, as tools do that merge adapters shard by shard (axolotl)."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import peft.tuners.lora.layer as peft_layers
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn

from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import ConfigError, LayerKindError
from nbpeft.model import get_peft_model
from nbpeft.peft_api.layers import layer_class
from tests.closeness import assert_close

KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(2, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: torch.randn(2, 2, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(7, 4), lambda: torch.arange(5)),
}


class Experts(nn.Module):
    def __init__(self, *shape: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.down_proj = nn.Parameter(torch.randn(*shape), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.down_proj if self.down_proj.ndim == 3 else self.down_proj[None]
        return x @ (weight if self.is_transposed else weight.mT)


def pair(name: str, make: Callable[[], nn.Module], *args: Any, **fields: Any) -> tuple[Any, Any]:
    """The same layer of nbpeft and of PEFT, with the same random tensors."""
    torch.manual_seed(0)
    base = make()
    given: dict[str, Any] = {"r": 2, "lora_alpha": 6, "use_dora": fields.get("use_dora", False)}
    built = layer_class(f"lora.{name}")(base, "default", *args, config=LoraConfig(r=8, **fields), **given)
    oracle = getattr(peft_layers, name)(
        copy.deepcopy(base.cpu()), "default", *args, config=PeftLoraConfig(r=8, **fields), **given
    )
    state = {key: torch.randn_like(value) for key, value in oracle.state_dict().items()}
    assert set(built.state_dict()) == set(state)
    for layer in (built, oracle):
        layer.load_state_dict(state)
    gc.collect()
    return built, oracle


def check_equal(built: Any, oracle: Any, x: Tensor) -> None:
    assert_close(built(x), oracle(x))
    if not built.use_dora["default"]:  # PEFT's is then B A without the magnitude, which is not what merging adds
        assert_close(built.get_delta_weight("default"), oracle.get_delta_weight("default"))
    unmerged = built(x)
    for layer in (built, oracle):
        layer.merge(adapter_names=["default"])
    merged = dict(oracle.get_base_layer().named_parameters())
    for key, value in built.get_base_layer().named_parameters():
        assert_close(value, merged[key])
    assert_close(built(x), unmerged)
    built.unmerge()
    assert_close(built(x), unmerged)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["plain", "dora", "rslora"])
@pytest.mark.parametrize("name", KINDS)
def test_a_layer_alone_computes_and_merges_as_in_peft(name: str, fields: dict[str, Any]) -> None:
    make, x = KINDS[name]
    check_equal(*pair(name, make, **fields), x())


@pytest.mark.parametrize(
    "make",
    [lambda: Experts(3, 5, 6), lambda: Experts(3, 6, 5, is_transposed=True), lambda: Experts(5, 6)],
    ids=["experts", "transposed", "matrix"],
)
def test_a_parameter_alone_computes_and_merges_as_in_peft(make: Callable[[], nn.Module]) -> None:
    check_equal(*pair("ParamWrapper", make, "down_proj"), torch.randn(3, 4, 6))


def test_tensors_can_be_assigned_as_axolotl_does() -> None:
    base = nn.Linear(6, 5, bias=False)
    before = base.weight.detach().clone()
    config = LoraConfig(r=2, lora_alpha=4, use_dora=True)
    layer = layer_class("lora.Linear")(base, adapter_name="default", config=config, r=2, lora_alpha=4)
    A, B, magnitude = torch.randn(2, 6), torch.randn(5, 2), torch.rand(5) + 0.5
    layer.lora_A["default"].weight.data = A
    layer.lora_B["default"].weight.data = B
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(magnitude)
    layer.merge(adapter_names=["default"])
    adapted = before + 2 * B @ A
    assert_close(base.weight, adapted * (magnitude / adapted.norm(dim=1))[:, None])


def test_a_layer_alone_can_be_copied_and_pickled() -> None:
    built, _ = pair("Linear", KINDS["Linear"][0], use_dora=True)
    x = torch.randn(3, 6)
    for twin in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert torch.equal(twin(x), built(x))
        twin.merge()
        assert twin.merged and not built.merged
        assert_close(twin(x), built(x))


def test_the_config_of_a_whole_model_is_used_for_the_layer_alone() -> None:
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=["layer"], rank_pattern={"layer": 1}, use_dora=True)
    built = layer_class("lora.Linear")(nn.Linear(6, 5), "default", config, 4, 8)
    assert built.r == {"default": 4} and built.scaling == {"default": 2.0}
    assert config.target_modules == {"q_proj"} and config.r == 8


@pytest.mark.parametrize(
    ("name", "make", "fields", "error", "message"),
    [
        ("Conv2d", lambda: nn.Linear(6, 5), {}, LayerKindError, "lora.Conv2d does not adapt a Linear, but lora.Linear"),
        ("Embedding", nn.ReLU, {}, LayerKindError, "lora.Embedding does not adapt a ReLU"),
        (
            "Linear",
            lambda: nn.Linear(6, 5),
            {"use_dora": True, "fan_in_fan_out": True},
            ConfigError,
            "fan_in_fan_out=True is not for a Linear: leave it out",
        ),
        (
            "Linear",
            lambda: pair("Linear", KINDS["Linear"][0], use_dora=True)[0],
            {"use_dora": True},
            LayerKindError,
            "lora.Linear cannot be built around a Linear with adapters",
        ),
    ],
    ids=["other-kind", "no-kind", "orientation", "adapted"],
)
def test_a_layer_that_does_not_fit_is_refused_and_unchanged(
    name: str, make: Callable[[], nn.Module], fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    base = make()
    trained = [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(error, match=message):
        layer_class(f"lora.{name}")(base, "default", LoraConfig(**fields), 2, 4)
    assert [parameter.requires_grad for parameter in base.parameters()] == trained


def test_a_class_that_derives_from_a_buildable_one_has_its_own_instances() -> None:
    own = type("OwnLinear", (layer_class("lora.Linear"),), {})
    assert type(own(nn.Linear(6, 5), "default", LoraConfig(), 2, 4)) is own
    with pytest.raises(ConfigError, match=r"use_dora=True is not supported by custom layer classes \(OwnLinear\)"):
        own(nn.Linear(6, 5), "default", LoraConfig(use_dora=True), 2, 4)


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
def test_a_buildable_class_is_refused_as_the_custom_class_of_a_model(name: str) -> None:
    config = LoraConfig(target_modules=["0"], use_dora=True)
    config._register_custom_module({nn.Linear: layer_class(f"lora.{name}")})
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ConfigError, match="custom"):
        get_peft_model(model, config)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
