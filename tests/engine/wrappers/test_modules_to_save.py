"""Modules trained as a whole, commanded one by one as PEFT's are."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper as TheirWrapper
from torch import Tensor, nn

import nbpeft
from nbpeft.errors import AdapterError
from nbpeft.model import LoraLayer, ModulesToSaveWrapper

INPUT = torch.linspace(-1, 1, 6).reshape(3, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x))  # type: ignore[no-any-return]


def both() -> tuple[Any, Any]:
    """A model of nbpeft and one of PEFT with the adapters "default" and "other", each with weights of its own."""
    fields: dict[str, Any] = {"target_modules": ["first"], "modules_to_save": ["head"], "r": 2}
    made: list[Any] = []
    for library in (nbpeft, peft):
        torch.manual_seed(0)
        model = library.get_peft_model(Model(), library.LoraConfig(**fields))
        model.add_adapter("other", library.LoraConfig(**fields))
        with torch.no_grad():
            for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
                parameter.copy_(torch.linspace(-1, number, parameter.numel()).reshape(parameter.shape))
        made.append(model)
    return made[0], made[1]


def wrappers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper | TheirWrapper)]


def parts(model: Any) -> list[Any]:
    kinds = (LoraLayer, ModulesToSaveWrapper, BaseTunerLayer, TheirWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same(ours: Any, theirs: Any) -> None:
    assert trained(ours) == trained(theirs)
    assert torch.equal(ours(INPUT), theirs(INPUT))


@pytest.mark.parametrize("inference_mode", [False, True])
def test_every_part_is_switched_as_transformers_does(inference_mode: bool) -> None:
    ours, theirs = both()
    for model in (ours, theirs):
        for part in parts(model):
            part.set_adapter("other", inference_mode=inference_mode)
    assert_same(ours, theirs)
    assert ours.get_model_status().active_adapters == theirs.get_model_status().active_adapters == ["other"]
    ours.set_adapter("default")
    theirs.set_adapter("default")
    assert_same(ours, theirs)


def test_every_part_is_disabled_and_enabled_as_transformers_does() -> None:
    ours, theirs = both()
    before = ours(INPUT)
    for enabled in (False, True):
        for model in (ours, theirs):
            for part in parts(model):
                part.enable_adapters(enabled)
        assert torch.equal(ours(INPUT), theirs(INPUT))
        assert ours.get_model_status().enabled is theirs.get_model_status().enabled is enabled
    assert torch.equal(ours(INPUT), before)


def test_one_copy_alone_is_switched_until_a_command_on_the_model() -> None:
    ours, theirs = both()
    before = ours(INPUT)
    for model in (ours, theirs):
        wrappers(model)[0].set_adapter("other")
    assert_same(ours, theirs)
    assert wrappers(ours)[0].active_adapters == ["other"]
    assert ours.get_model_status().active_adapters == theirs.get_model_status().active_adapters == "irregular"
    ours.set_adapter("default")
    assert torch.equal(ours(INPUT), before)
    assert ours.get_model_status().active_adapters == ["default"]


def test_two_copies_cannot_act_on_one_module() -> None:
    model, _ = both()
    before = model(INPUT)
    with pytest.raises(AdapterError, match="'default' and 'other' each trained their own copy of a Linear"):
        wrappers(model)[0].set_adapter(["default", "other"])
    assert torch.equal(model(INPUT), before)
    assert wrappers(model)[0].active_adapters == ["default"]


@pytest.mark.parametrize("tokens", [False, True], ids=["copies", "tokens"])
@pytest.mark.filterwarnings("ignore:the active adapter", "ignore:.*share one weight")
def test_the_active_adapter_is_a_string_as_in_peft(tokens: bool) -> None:
    """axolotl takes the copy ``modules_to_save[module.active_adapter]``."""

    def states(library: Any) -> list[Any]:
        more: dict[str, Any] = (
            {"trainable_token_indices": {"table": [1, 2]}} if tokens else {"modules_to_save": ["head"]}
        )
        base = nn.Sequential()
        base.table, base.first, base.head = nn.Embedding(4, 2), nn.Linear(2, 3), nn.Linear(3, 2)
        model = library.get_peft_model(base, library.LoraConfig(target_modules=["first"], r=2, **more))
        wrapper, found = model.get_base_model().table if tokens else model.get_base_model().head, []

        def note() -> None:
            found.append((wrapper.active_adapter, wrapper.active_adapters, wrapper.disable_adapters))

        note()
        model.add_adapter("other", library.LoraConfig(target_modules=["first"], r=2, **more))
        model.add_adapter("plain", library.LoraConfig(target_modules=["first"], r=2))
        for name in ("other", "plain", "default"):
            model.set_adapter(name)
            note()
        with model.disable_adapter():
            note()
        model.base_model.set_adapter(["default", "plain"])
        note()
        model.set_adapter("default")
        model.delete_adapter("default")
        note()
        return found

    assert states(nbpeft) == states(peft)


def test_transformers_is_told_where_a_file_s_tensors_belong() -> None:
    ours, theirs = (
        library.get_peft_model(Model(), library.LoraConfig(target_modules=["first"], modules_to_save=["head"]))
        for library in (nbpeft, peft)
    )
    for name in ("default", "nobody"):
        found, wanted = (one.base_model.model.head.adapter_state_dict_load_map(name) for one in (ours, theirs))
        assert found == wanted and len(found) == (2 if name == "default" else 0)


@pytest.mark.parametrize("names", [["default", "other"], ["other", "default"]])
def test_a_module_answers_after_its_last_copy_was_deleted(names: list[str]) -> None:
    """The test of deletion in transformers reads ``lm_head.modules_to_save``."""
    ours, theirs = both()
    base = Model()
    base.load_state_dict({key: value for key, value in zip(base.state_dict(), frozen(ours), strict=True)})
    for name in names:
        heads = [model.base_model.model.head for model in (ours, theirs)]
        for model in (ours, theirs):
            model.delete_adapter(name)
        now = [model.base_model.model.head.modules_to_save for model in (ours, theirs)]
        assert list(now[0]) == list(now[1]) and name not in now[0] and len(heads[0].modules_to_save) == len(now[1])
    model = ours.get_base_model()
    assert torch.equal(ours(INPUT), base(INPUT))
    assert list(model.state_dict()) == list(base.state_dict())
    ours.add_adapter("again", nbpeft.LoraConfig(target_modules=["first"], modules_to_save=["head"], r=2))
    ours.set_adapter("again")
    assert list(model.head.modules_to_save) == ["again"] and "head.modules_to_save.again.weight" in model.state_dict()
    assert torch.equal(ours(INPUT), base(INPUT))
    ours.delete_adapter("again")
    ours.add_adapter("on the head", nbpeft.LoraConfig(target_modules=["head"], r=2))
    assert torch.equal(ours(INPUT), base(INPUT))
    ours.merge_and_unload()
    assert not any(hasattr(module, "modules_to_save") for module in model.modules())
    assert torch.equal(model(INPUT), base(INPUT))


def frozen(model: Any) -> list[Tensor]:
    """The tensors of the base model."""
    return [value for key, value in model.state_dict().items() if "base_layer" in key or "original_module" in key]


def test_a_deletion_that_fails_leaves_the_module_as_it_was() -> None:
    model, _ = both()
    model.delete_adapter("other")
    head = model.base_model.model.head
    original = head.original_module
    with pytest.raises(RuntimeError), model.manager.transaction():
        model.manager.remove("default")
        raise RuntimeError
    assert model.base_model.model.head is head and not hasattr(original, "modules_to_save")
