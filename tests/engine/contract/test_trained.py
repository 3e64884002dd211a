"""Which adapters were trained since they were added, loaded or saved, whoever made the step."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from nbpeft import LoraConfig, get_peft_model, hotswap_adapter
from nbpeft.engine.contract.trained import mark_saved, mark_unsaved
from nbpeft.errors import CheckpointError
from nbpeft.model import set_peft_model_state_dict
from tests.tiny_models import llama

IDS = torch.arange(8)[None]


@pytest.fixture
def model() -> Any:
    """Adapters ``a``, which is active, and ``b``."""
    made = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a")
    made.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return made


def step(model: Any, kind: type[Optimizer] = SGD, **options: Any) -> None:
    """One step of a loop of one's own on whatever is active."""
    optimizer: Any = kind([one for one in model.parameters() if one.requires_grad], lr=0.1, **options)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_a_step_marks_what_it_trained(model: Any, options: dict[str, Any]) -> None:
    assert model.manager.unsaved == set()
    step(model, AdamW, **options)
    assert model.manager.unsaved == {"a"}
    model.set_adapter("b")
    step(model)
    assert model.manager.unsaved == {"a", "b"}


def test_only_what_a_gradient_reached_is_marked(model: Any) -> None:
    """The optimizer holds both adapters, and only the active one learns."""
    optimizer = SGD([one for name in ("a", "b") for one in model.manager.parameters(name)], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert model.manager.unsaved == {"a"}


def test_one_that_learned_in_a_block_is_marked_outside_of_it(model: Any) -> None:
    with model.use("b"):
        optimizer = SGD(model.manager.parameters("b"), lr=0.1)
        model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert model.manager.unsaved == {"b"}


def test_another_models_step_marks_nothing(model: Any) -> None:
    other = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    step(other)
    assert model.manager.unsaved == set() and other.manager.unsaved == {"default"}


def test_a_gradient_without_a_step_marks_nothing(model: Any) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.zero_grad()
    assert model.manager.unsaved == set()


def test_those_who_follow_hear_of_it_once(model: Any) -> None:
    heard: list[set[str]] = []
    model.manager.subscribe(lambda: heard.append(set(model.manager.unsaved)))
    for _ in range(3):
        step(model)
    assert heard == [{"a"}]


def test_saving_takes_the_mark_off(model: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        model.set_adapter(name)
        step(model)
    model.save_pretrained(str(tmp_path), selected_adapters=["a"])
    assert model.manager.unsaved == {"b"}
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        model.save_pretrained(str(tmp_path / "file" / "x"))
    assert model.manager.unsaved == {"b"}, "what could not be saved is not saved"
    step(model)
    model.save_pretrained(str(tmp_path))
    assert model.manager.unsaved == set()
    step(model)
    assert model.manager.unsaved == {"b"}


def test_the_mark_goes_with_the_adapter(model: Any, tmp_path: Path) -> None:
    manager = model.manager
    model.save_pretrained(str(tmp_path))
    step(model)
    manager.rename("a", "z")
    assert manager.unsaved == {"z"}
    manager.copy("z", "twin")
    assert manager.unsaved == {"z", "twin"}, "the copy is not on disk either"
    manager.remove("twin")
    assert manager.unsaved == {"z"}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.manager.unsaved == {"z"}
        mark_saved(twin.manager, "z")
        step(twin)
        assert twin.manager.unsaved == {"z"}, "a copy is watched, too"
    hotswap_adapter(model, str(tmp_path / "a"), "z")
    assert manager.unsaved == set()
    step(model)
    model.load_adapter(str(tmp_path / "a"), "z", is_trainable=True)
    assert manager.unsaved == set()
    step(model)
    model.unload()
    assert manager.unsaved == set()


def test_what_fails_leaves_the_mark(model: Any) -> None:
    step(model)
    with pytest.raises(RuntimeError, match="pretended"), model.manager.transaction():
        model.manager.remove("a")
        assert model.manager.unsaved == set()
        raise RuntimeError("pretended")
    assert model.manager.unsaved == {"a"}


def test_values_that_are_put_there_are_not_training(model: Any) -> None:
    with torch.no_grad():
        tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, 2)}
        set_peft_model_state_dict(model, tensors, "a")
    assert model.manager.unsaved == set()
    mark_unsaved(model.manager, "a")
    mark_unsaved(model.manager, "a")
    assert model.manager.unsaved == {"a"}
