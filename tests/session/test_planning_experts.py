"""What adapters on experts add, counted as PEFT counts them, and said in a plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nbpeft import LoraConfig, get_peft_model
from nbpeft.session.core import Session
from tests.tiny_models import MIXTURES, experts_of, mixture

peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' adapts linear layers only")
@pytest.mark.parametrize("with_experts", [False, True])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_trainable_parameters_of_mixtures_are_those_of_peft(
    model_type: str, with_experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of linear layers, and of experts that are named by themselves; without what PEFT renames, which they are not."""
    monkeypatch.setattr("peft.utils.transformers_weight_conversion._convert_peft_config_moe", lambda *_: None)
    fields: dict[str, Any] = {"r": 3, "target_modules": "all-linear", "exclude_modules": ["experts", "gate"]}
    if with_experts:
        fields["target_parameters"] = experts_of(model_type)
    base = mixture(model_type)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    ours = get_peft_model(base, LoraConfig(**fields))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.drawn(1)
@pytest.mark.filterwarnings("ignore:target_modules='all-linear' adapts linear layers only")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_plan_says_what_share_the_experts_add(model_type: str) -> None:
    session, base = Session(), mixture(model_type, "grouped_mm")
    fields: dict[str, Any] = {"r": 3, "target_modules": "all-linear", "exclude_modules": ["experts", "gate"]}
    sizes: dict[str, Any] = {"batch_size": 1, "max_length": 16, "suggest": False, "dtype": "bfloat16"}
    plain = session.plan(base, fields, **sizes)
    assert "experts" not in str(plain)
    planned = session.plan(base, fields | {"target_parameters": experts_of(model_type)}, **sizes)
    counts = []
    for added in ({}, {"target_parameters": experts_of(model_type)}):
        adapted = get_peft_model(copy.deepcopy(base), LoraConfig(**fields, **added))
        counts.append(adapted.get_nb_trainable_parameters()[0])
    experts, total = counts[1] - counts[0], counts[1]
    share = f"{100 * experts / total:.2f} %"
    assert f"adapters on experts are {share} of the trainable parameters ({experts:,} of {total:,})" in str(planned)
