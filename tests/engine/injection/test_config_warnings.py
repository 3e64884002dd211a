"""What a plan warns of or refuses: patterns and names that do nothing, layers without a bias, containers."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import nbpeft
from nbpeft.engine.config.module_paths import PatternTable
from nbpeft.engine.contract.adapter import Adapter, AdapterConfig
from nbpeft.engine.injection.config_warnings import warn_about_config
from nbpeft.engine.injection.plan import plan
from nbpeft.errors import PeftWarning, TargetError
from nbpeft.model import LoraConfig, PeftModel, get_peft_model
from tests.closeness import assert_close


class Model(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=bias)
        self.second = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4)})
        self.numbers = nn.ParameterList([])


def settings(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["first", "second"], **changes})


PATTERNS: list[tuple[dict[str, int], tuple[str, ...]]] = [
    ({"first": 2}, ()),
    ({"firts": 2}, ("firts",)),
    ({"irst": 2, "first": 3}, ("irst",)),
    ({"first": 2, "model.first": 3}, ("model.first",)),
    ({"(first|second)": 2, "second": 3}, ()),
    ({r"layers\.\d+\.first": 2, r"fir[a-z]t": 3}, (r"layers\.\d+\.first",)),
    ({"blocks.0": 2}, ("blocks.0",)),
]


@pytest.mark.parametrize(("patterns", "unused"), PATTERNS)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_match_nothing_are_named(name: str, patterns: dict[str, int], unused: tuple[str, ...]) -> None:
    assert PatternTable(patterns).unused(["first", "second"]) == unused
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["first", "second"], **{name: patterns}))
    assert [str(entry.message).count(repr(key)) for entry in theirs for key in unused] == [1] * len(unused)
    if not unused:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan(Model(), settings(**{name: patterns}), allow_missing=False)
        return
    message = re.escape(f"{name} [{', '.join(map(repr, unused))}] did not match any targeted module")
    message += " and (has|have) no effect"
    with pytest.warns(RuntimeWarning, match=message):
        plan(Model(), settings(**{name: patterns}))
    with pytest.raises(TargetError, match=message):
        plan(Model(), settings(**{name: patterns}), allow_missing=False)


def test_a_module_that_is_adapted_and_trained_as_a_whole_is_told() -> None:
    both = r"^'second' is in target_modules and in modules_to_save: trained as a whole, it gets no adapter$"
    with pytest.warns(UserWarning, match=both):
        made = plan(Model(), settings(modules_to_save=["second"]))
    assert list(made.copies) == ["second"] and [target.path for target in made.targets] == ["first"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(Model(), settings(target_modules="all-linear", modules_to_save=["second"]))


def test_a_stored_config_is_not_told_of_what_all_linear_matched(tmp_path: Path) -> None:
    """As in PEFT's files, ``target_modules`` then lists the head that the task trains as a whole."""
    base = Model()
    model = get_peft_model(copy.deepcopy(base), settings(target_modules="all-linear", modules_to_save=["second"]))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "second" in {*stored["target_modules"]} & {*stored["modules_to_save"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(base, tmp_path)
        loaded.load_adapter(tmp_path, "default")
        loaded.load_adapter(tmp_path, "other")
    assert loaded.manager.names == ("default", "other")


def test_the_near_name_is_told() -> None:
    with pytest.warns(RuntimeWarning, match="Did you mean 'first'"):
        plan(Model(), settings(rank_pattern={"firts": 2}))


def test_a_bias_that_cannot_be_merged_is_told_before() -> None:
    with pytest.warns(PeftWarning, match="has no bias: the adapter cannot be merged at first"):
        model = get_peft_model(Model(bias=False), settings(lora_bias=True))
    assert model.manager.names == ("default",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(Model(), settings(lora_bias=True))


def test_one_of_several_modules_to_save_may_be_missing() -> None:
    with pytest.warns(UserWarning, match=r"modules_to_save 'secnd' matches no module.* Did you mean 'second'"):
        made = plan(Model(), settings(target_modules=["first"], modules_to_save=["second", "secnd"]))
    assert list(made.copies) == ["second"]
    for names, allow_missing in ((["secnd"], True), (["second", "secnd"], False)):
        with pytest.raises(TargetError, match="modules_to_save 'secnd' matches no module"):
            plan(Model(), settings(target_modules=["first"], modules_to_save=names), allow_missing=allow_missing)


@pytest.mark.parametrize("name", ["blocks", "named", "numbers"])
def test_a_container_cannot_be_trained_as_a_whole(name: str) -> None:
    model = Model()
    with pytest.raises(TargetError, match=f"cannot be applied to .* {name}, .*name the modules inside"):
        get_peft_model(model, settings(modules_to_save=[name]))
    assert type(model.first) is nn.Linear


def test_an_exclusion_that_names_nothing_is_told() -> None:
    for library in (nbpeft, peft):
        with pytest.warns(UserWarning, match="exclude_modules"):
            library.get_peft_model(
                Model(), library.LoraConfig(target_modules=["first", "second"], exclude_modules=["thrid"])
            )
    with pytest.raises(TargetError, match=r"exclude_modules.*no modules were excluded"):
        plan(Model(), settings(exclude_modules=["thrid"]), allow_missing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(Model(), settings(exclude_modules=["blocks.0"]))


class Tagger(nn.Module):
    """A classifier whose head has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.classification_head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classification_head(self.first(x))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_head_of_another_name_is_told_and_goes_as_in_peft(task: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Tagger(), torch.randn(3, 4)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["first"], task_type=task, init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no module .* neither trained nor saved unless modules_to_save names it"):
        ours = nbpeft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(ours.base_model(x), theirs.base_model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = {"target_modules": ["first"], "task_type": "SEQ_CLS", "modules_to_save": ["classification_head"]}
        get_peft_model(copy.deepcopy(base), LoraConfig(**named))
    with pytest.raises(TargetError, match="modules_to_save 'score' matches no module"):
        get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["first"], modules_to_save=["score"]))


class Experts(nn.Module):
    """Two linear maps in one tensor, as transformers keeps those of a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))


def test_experts_that_all_linear_does_not_reach_are_told() -> None:
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(model, settings(target_modules="all-linear"))
    model.experts = Experts()
    with pytest.warns(UserWarning, match=r"the experts \(experts\.down_proj, \d+% of .*\) are stacked weights"):
        plan(model, settings(target_modules="All-Linear"))
    model.further = Experts()
    with pytest.warns(UserWarning, match=r"the experts \(experts\.down_proj and 1 more, \d+% of"):
        plan(model, settings(target_modules="all-linear"))
    with pytest.warns(UserWarning, match="stacked weights and are not adapted$"):
        plan(model, nbpeft.IA3Config(target_modules="all-linear", feedforward_modules=[]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(model, settings(target_modules=["first"]))


def test_parameters_of_an_adapter_are_not_taken_for_experts() -> None:
    model = get_peft_model(Model(), nbpeft.GraloraConfig(target_modules=["first"], r=2, gralora_k=2)).base_model.model
    assert any(parameter.ndim == 3 for parameter in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(model, settings(target_modules="all-linear"))


def test_a_config_of_another_method_needs_no_field_that_it_does_not_use() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_config(AdapterConfig(), Adapter, [("first", nn.Linear(4, 4))], strict=False)
