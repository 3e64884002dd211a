"""OSF against peft's: how much of a weight is kept, and gradients that leave that alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import convert_to_lora, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import gpt2, llama, logits, logits_of_each, randomize, tokens

FIELDS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"effective_rank": 0.8},
        {"effective_rank": 1.0},
        {"effective_rank": 1},
        {"effective_rank": 99},
        {"effective_rank": 7.9, "init_weights": False},
        {"rank_pattern": {"layers.0": 3, "down": 0.3, "down_proj": 5}},
    ],
)
def test_a_new_adapter_is_that_of_peft(fields: dict[str, Any]) -> None:
    models: list[Any] = []
    for library, wrap in ((nbpeft, get_peft_model), (peft, peft.get_peft_model)):
        torch.manual_seed(1)
        config: Any = library.OSFConfig(**FIELDS, **fields)  # type: ignore[attr-defined]
        models.append(wrap(llama(), config).eval())
    ours, theirs = models
    expected, found = peft.get_peft_model_state_dict(theirs), nbpeft.get_peft_model_state_dict(ours)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert_close(found[key].detach(), tensor.detach())
    assert_close(logits(ours), logits(theirs))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    layers = [model.base_model.model.model.layers[1].mlp.down_proj for model in models]
    assert layers[0].effective_rank["default"] == layers[1].effective_rank["default"]
    for key, tensor in layers[1].osf_svd_params["default"].items():
        assert_close(layers[0].osf_svd_params["default"][key].detach(), tensor.detach())
    for name in ("_osf_U_low_init", "_osf_S_low_init", "_osf_V_low_init", "_osf_U_high", "_osf_V_high"):
        wanted = getattr(layers[1], name)
        assert ("default" in getattr(layers[0], name)) == ("default" in wanted)
        if "default" in wanted:
            assert_close(getattr(layers[0], name)["default"], wanted["default"])


@pytest.mark.parametrize("shape", [(12, 6), (6, 12), (8, 8)])
def test_gradients_are_those_of_peft_and_leave_what_is_kept(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(*shape))
    ours: Any = get_peft_model(net, nbpeft.OSFConfig(target_modules=["0"], effective_rank=3))
    randomize(ours, scale=0.3)
    x = torch.randn(5, shape[0])
    ours(x).square().sum().backward()
    layer = ours.base_model.model[0]
    left, _, right = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
    found = {name: tensor.grad for name, tensor in layer.osf_svd_params["default"].items()}
    for part, kept in (
        (left[:, :3].T @ found["U_low"], found["U_low"]),
        (found["V_low"] @ right[:3].T, found["V_low"]),
    ):
        assert_close(part, torch.zeros_like(part), scale=float(kept.abs().max()))
    theirs: Any = peft.get_peft_model(
        nn.Sequential(layer.base_layer), peft.OSFConfig(target_modules=["0"], effective_rank=3)
    )
    own = nbpeft.get_peft_model_state_dict(ours)
    peft.set_peft_model_state_dict(theirs, {key: tensor.detach() for key, tensor in own.items()})
    theirs(x).square().sum().backward()
    for name, tensor in theirs.base_model.model[0].osf_svd_params["default"].items():
        assert_close(found[name], tensor.grad)
    parameters = {name: tensor.detach() for name, tensor in ours.named_parameters() if tensor.requires_grad}

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        output: torch.Tensor = torch.func.functional_call(ours, given, (x,))
        return output.square().sum()

    for name, gradient in torch.func.grad(loss)(parameters).items():
        assert_close(gradient, ours.get_parameter(name).grad)


def test_a_trained_adapter_has_no_part_in_what_is_kept() -> None:
    model: Any = get_peft_model(llama(), nbpeft.OSFConfig(**FIELDS)).train()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in (
        model.base_model.model.model.layers[0].mlp.up_proj,
        model.base_model.model.model.layers[1].mlp.down_proj,
    ):
        left, _, right = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
        delta = layer.get_delta_weight("default")
        assert delta.abs().max() > 1e-4
        for part in (left[:, :16].T @ delta, delta @ right[:16].T):
            assert_close(part, torch.zeros_like(part), scale=float(layer.base_layer.weight.abs().max()))


def test_two_active_adapters_add_up_and_do_not_in_peft(tmp_path: Path) -> None:
    model: Any = get_peft_model(llama(), nbpeft.OSFConfig(**FIELDS))
    model.add_adapter("other", nbpeft.OSFConfig(target_modules=["q_proj"], effective_rank=5))
    randomize(model, scale=0.3)
    expected = logits_of_each(model)
    model.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(llama(), tmp_path)
    theirs.load_adapter(str(tmp_path / "other"), "other")
    theirs.base_model.set_adapter(["default", "other"])
    assert_close(logits(theirs), expected["default"])
    model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter()
    assert_close(logits(model), both)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    model.delete_adapter("default")
    model.load_adapter(str(tmp_path), "default")
    model.set_adapter("default")
    assert_close(logits(model), expected["default"])
    base, own = model.unload().state_dict(), llama().state_dict()
    assert base.keys() == own.keys() and all(torch.equal(base[key], own[key]) for key in own)


def test_in_bfloat16_it_starts_at_the_base() -> None:
    model = get_peft_model(llama(dtype=torch.bfloat16), nbpeft.OSFConfig(**FIELDS))
    assert torch.equal(logits(model.eval()), logits(llama(dtype=torch.bfloat16)))


def test_without_names_all_linear_layers_of_an_unknown_model_are_adapted() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    names = {
        name.rpartition(".")[0] for name in nbpeft.get_peft_model_state_dict(get_peft_model(net, nbpeft.OSFConfig()))
    }
    assert names == {"base_model.model.0.osf_svd_params", "base_model.model.2.osf_svd_params"}
    model = get_peft_model(gpt2(), nbpeft.OSFConfig())  # whose layers peft leaves out
    assert_close(logits(model.eval()), logits(gpt2()))


def test_whole_state_dicts_of_both_are_read() -> None:
    models: list[Any] = [get_peft_model(llama(), nbpeft.OSFConfig(**FIELDS))]
    models.append(peft.get_peft_model(llama(), peft.OSFConfig(**FIELDS)))
    for source in models:
        with torch.no_grad():
            for parameter in (one for one in source.parameters() if one.requires_grad):
                parameter += torch.randn_like(parameter) * 0.3
        again = get_peft_model(llama(), nbpeft.OSFConfig(**FIELDS))
        assert not nbpeft.set_peft_model_state_dict(again, source.state_dict()).missing_keys
        assert_close(logits(again.eval()), logits(source.eval()))


def test_as_a_lora_it_is_the_same() -> None:
    model = get_peft_model(llama(), nbpeft.OSFConfig(**FIELDS, effective_rank=28))
    randomize(model, scale=0.3)
    config, tensors = convert_to_lora(model, rank=8)
    lora = get_peft_model(llama(), config)
    nbpeft.set_peft_model_state_dict(lora, tensors)
    expected = model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default")  # type: ignore[union-attr]
    found = lora.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default")  # type: ignore[union-attr]
    assert_close(found, expected)


@pytest.mark.parametrize("top_k", [3, 99])
def test_the_functions_beside_it_are_those_of_peft(top_k: int) -> None:
    from peft.tuners.osf import utils as wanted

    found = importlib.import_module("nbpeft.tuners.osf.utils")
    torch.manual_seed(0)
    weight = torch.randn(7, 5)
    ours, theirs = (one.decompose_weight_matrix(weight, top_k) for one in (found, wanted))
    assert ours.keys() == theirs.keys() and ours["rank_high"] == theirs["rank_high"]
    for parts in (ours, theirs):
        for name in ("U", "S", "V"):
            parts[f"{name}_low"].grad = torch.ones_like(parts[f"{name}_low"])
    found.project_gradient_to_orthogonal_space(ours)
    wanted.project_gradient_to_orthogonal_space(theirs)
    for key, part in theirs.items():
        if key != "rank_high":
            assert_close(ours[key].detach(), part.detach())
            assert type(ours[key]) is type(part)
        if key.endswith("_low"):
            assert_close(ours[key].grad, part.grad)


@pytest.mark.parametrize("fields", [{"effective_rank": 0}, {"effective_rank": -0.5}, {"effective_rank": float("nan")}])
def test_impossible_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="effective_rank must be"):
        nbpeft.OSFConfig(**fields)
    with pytest.raises(ConfigError, match=r"rank_pattern\['q'\] must be"):
        nbpeft.OSFConfig(rank_pattern={"q": fields["effective_rank"]})


def test_patterns_are_checked_and_unused_ones_named() -> None:
    with pytest.raises(ConfigError, match="could take forever"):
        nbpeft.OSFConfig(rank_pattern={"(a*)*b": 3})
    with pytest.raises(ConfigError, match=r"effective_rank = 0\.01 keeps none of the 32 directions of its weight"):
        get_peft_model(llama(), nbpeft.OSFConfig(**FIELDS, effective_rank=0.01))
    with pytest.warns(RuntimeWarning, match=r"rank_pattern \['qproj'\] did not match any targeted module and has no"):
        get_peft_model(llama(), nbpeft.OSFConfig(**FIELDS, rank_pattern={"qproj": 3}))


def test_a_weight_without_singular_directions_is_refused_by_its_path() -> None:
    model = llama()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.v_proj: its weight has no singular directions"):
        get_peft_model(model, nbpeft.OSFConfig(**FIELDS))
    assert not any("osf" in name for name, _ in model.named_parameters())
