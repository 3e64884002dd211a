"""Modules that PEFT has on ``base_model``: names, state dicts in both directions, commands, copies."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nbpeft
from tests.closeness import assert_close, is_close
from tests.tiny_models import classifier, llama, logits, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL: dict[str, Any] = {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2}
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "shadow": (llama, "ShadowConfig", {"task_type": "CAUSAL_LM", **SMALL}),
    "shadow-classifier": (classifier, "ShadowConfig", {"task_type": "SEQ_CLS"}),
    "frod": (llama, "FrodConfig", {"target_modules": ["q_proj", "o_proj"]}),
    "frod-found": (llama, "FrodConfig", {"target_modules": ["q_proj"], "save_projection": False}),
}
CONTAINERS = ("shadow_backbone", "shadow_projection", "shadow_head", "frod_V", "frod_s_indices", "frod_s_size")
EACH = pytest.mark.parametrize("case", CASES)


def made(library: Any, case: str, name: str = "default") -> Any:
    base, config, fields = CASES[case]
    torch.manual_seed(1)
    return library.get_peft_model(base(), getattr(library, config)(**fields), name)


def names_of(model: Any) -> list[list[str]]:
    listed = [name for name, _ in model.named_modules() if name.partition(".")[2].startswith(CONTAINERS)]
    buffers = [name for name, _ in model.named_buffers() if not name.startswith("base_model.model.")]
    return [listed, buffers, [name for name, _ in model.named_parameters()], [*model.state_dict()]]


@EACH
def test_names_and_whole_state_dicts_are_those_of_peft(case: str) -> None:
    ours, theirs = (made(library, case) for library in (nbpeft, peft))
    assert names_of(ours) == names_of(theirs)
    values = {
        name: torch.rand(one.shape) if one.dtype.is_floating_point else one for name, one in ours.state_dict().items()
    }
    for model, other in ((ours, theirs), (theirs, ours)):
        model.load_state_dict(values)
        assert all(torch.equal(one, values[name]) for name, one in model.state_dict().items())
        assert model.load_state_dict(other.state_dict()).unexpected_keys == []
    records = [[dataclasses.asdict(one) for one in model.get_layer_status()] for model in (ours, theirs)]
    assert records[0] == records[1]


@EACH
def test_a_state_dict_that_is_given_is_saved_as_in_peft(case: str, tmp_path: Path) -> None:
    saved = []
    for library in (nbpeft, peft):
        model = made(library, case)
        given = {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
        model.save_pretrained(tmp_path / library.__name__, state_dict=given)
        saved.append(load_file(tmp_path / library.__name__ / "adapter_model.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    assert all(is_close(value, saved[1][key]) for key, value in saved[0].items())


def containers(model: Any) -> dict[str, dict[str, nn.Module]]:
    """Container on ``base_model`` -> its modules by name."""
    found = {name: module for name, module in model.base_model.named_children() if name != "model"}
    return {name: dict(module.named_children()) for name, module in found.items()}


@EACH
def test_adapters_come_and_go_in_the_containers(case: str) -> None:
    model = made(nbpeft, case)
    before = containers(model)
    fields = getattr(nbpeft, CASES[case][1])(**CASES[case][2])
    if case != "shadow-classifier":
        model.add_adapter("other", fields)
    names = [*model.peft_config]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [*twin.state_dict()] == [*model.state_dict()]
        mine, others = containers(model), containers(twin)
        assert all(others[name][key] is not one for name, held in mine.items() for key, one in held.items())
    listed = [name for name, _ in (*model.named_modules(), *model.named_buffers()) if ".model." not in name]
    assert all(any(f".{name}" in one for one in listed) for name in names)
    model.delete_adapter("default")
    assert not any("default" in name for name, _ in (*model.named_modules(), *model.named_buffers()))
    model.add_adapter("default", fields)
    assert containers(model).keys() == before.keys()
    for name, held in before.items():
        assert held.keys() <= containers(model)[name].keys()


def test_the_modules_of_a_network_are_the_adapter_s_own() -> None:
    model = made(nbpeft, "shadow-classifier")
    network = model.base_model.shadow_backbone["default"]
    assert isinstance(model.base_model.shadow_backbone, nn.ModuleDict) and "default" in model.base_model.shadow_backbone
    model.eval()
    assert not network.training and not model.base_model.model.model.layers[0].shadow_dropout["default"].training
    model.train()
    assert network.training and model.base_model.model.model.layers[0].shadow_dropout["default"].training
    model.double()
    assert {one.dtype for one in network.parameters()} == {torch.float64}
    model.float()
    loss = model.base_model.shadow_auxiliary_loss
    assert loss(torch.tensor([0, 2])) is None
    mask = (torch.arange(9) < torch.tensor([[9], [4]])).long()
    output = model(input_ids=tokens(), attention_mask=mask, labels=torch.tensor([0, 2]))
    own = loss(torch.tensor([0, 2]), attention_mask=mask)
    assert_close(own.detach(), output.shadow_loss)
    own.backward()
    assert all(one.grad is not None for one in network.parameters())
    head = nn.Linear(32, 3)
    model.base_model.shadow_head["default"] = head
    model.base_model._seed_shadow_state = torch.ones(2, 9, 32)
    wanted = nn.functional.cross_entropy(head(torch.ones(2, 32)), torch.tensor([0, 2]))
    assert_close(loss(torch.tensor([0, 2])), wanted)
    assert copy.deepcopy(model).base_model._seed_shadow_state is None


def test_the_embedding_below_a_network_is_resized_as_in_peft() -> None:
    found = []
    for library in (nbpeft, peft):
        model = made(library, "shadow")
        torch.manual_seed(2)
        model.resize_token_embeddings(101)
        found.append((model.get_input_embeddings().weight.shape, [*model.state_dict()]))
        assert logits(model.eval()).shape[-1] == 101
    assert found[0] == found[1]
