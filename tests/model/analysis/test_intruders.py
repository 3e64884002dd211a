"""Intruder dimensions: taken back as in PEFT, and counted."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension as of_peft

from nbpeft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    reduce_intruder_dimension,
    set_peft_model_state_dict,
)
from nbpeft.errors import AdapterError, AdapterExistsError, MergeError, UnknownAdapterError
from nbpeft.model import get_peft_model_state_dict
from nbpeft.model.analysis.inspection import inspect_adapter
from nbpeft.session import Session
from tests.closeness import DEPTH, assert_close
from tests.tiny_models import adapted, gpt2, llama, logits, same_state, state


def both(scale: float = 0.5, **fields: Any) -> tuple[Any, Any]:
    """The same LoRA in PEFT and here."""
    base = llama()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **fields}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    ours = get_peft_model(base, LoraConfig(**settings))
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({}, {}),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"top_k": 4, "mitigation_lambda": 0.3}),
        ({}, {"threshold_epsilon": 0.8, "mitigation_lambda": 0.0}),
        ({}, {"threshold_epsilon": 0.0}),
    ],
)
def test_the_new_adapter_is_that_of_peft(fields: dict[str, Any], how: dict[str, Any]) -> None:
    ours, theirs = both(**fields)
    before = state(ours)
    lines: list[str] = []
    others: list[str] = []
    reduce_intruder_dimension(ours, logging_sink=lines.append, **how)
    of_peft(theirs, logging_sink=others.append, **how)
    assert lines == [line.removeprefix("base_model.model.") for line in others]
    assert ours.active_adapters == ["intruder_reduced"]
    assert_close(logits(ours), logits(theirs))
    wanted = peft.get_peft_model_state_dict(theirs, adapter_name="intruder_reduced")
    found = get_peft_model_state_dict(ours, adapter_name="intruder_reduced")
    assert found.keys() == wanted.keys()
    for key in wanted:
        if "lora_A" in key:  # each with the signs of its own decomposition
            other = key.replace("lora_A", "lora_B")
            assert_close(
                found[other] @ found[key], wanted[other] @ wanted[key], depth=2 * DEPTH, message=key
            )  # two decompositions
    after = state(ours)
    assert same_state({name: after[name] for name in before}, before)


def test_an_adapter_that_starts_in_the_weight_is_reduced_as_in_peft() -> None:
    ours, theirs = (
        both(0.0, init_lora_weights="pissa")[0],
        peft.get_peft_model(
            llama(),
            peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"),
        ),
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    reduce_intruder_dimension(ours, logging_sink=None)
    of_peft(theirs, logging_sink=None)
    # PEFT starts the new adapter in the base a second time, which it shifts for good: compared by the tensors.
    wanted = peft.get_peft_model_state_dict(theirs, adapter_name="intruder_reduced")
    found = get_peft_model_state_dict(ours, adapter_name="intruder_reduced")
    assert found.keys() == wanted.keys()


def test_layers_that_store_their_weight_turned_keep_their_shapes() -> None:
    """PEFT decomposes them as they are stored, so that its factors do not fit."""
    model = adapted(gpt2(), target_modules=["c_attn"], r=2)
    reduce_intruder_dimension(model, logging_sink=None)
    assert torch.isfinite(logits(model)).all()
    for key, value in get_peft_model_state_dict(model, adapter_name="intruder_reduced").items():
        assert value.shape == get_peft_model_state_dict(model, adapter_name="default")[key].shape


def test_what_cannot_be_reduced_is_refused_and_changes_nothing() -> None:
    model = adapted()
    before = state(model)
    with pytest.raises(UnknownAdapterError):
        reduce_intruder_dimension(model, "other")
    with pytest.raises(AdapterExistsError):
        reduce_intruder_dimension(model, new_adapter_name="default", logging_sink=None)
    model.merge_adapter()
    with pytest.raises(MergeError):
        reduce_intruder_dimension(model)
    model.unmerge_adapter()
    assert same_state(state(model), before)
    other: PeftModel = get_peft_model(llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="not using LoRA"):
        reduce_intruder_dimension(other)


def test_intruders_are_counted_where_they_are_asked_for() -> None:
    ours, theirs = both()
    lines: list[str] = []
    of_peft(theirs, logging_sink=lines.append)
    counts = [int(line.rpartition(" ")[2]) if line[-1].isdigit() else 0 for line in lines[:-1]]
    found = inspect_adapter(ours.manager, "default", intruders=True)
    assert [change.intruders for change in found] == counts and sum(counts) > 0
    assert all(change.intruders is None for change in inspect_adapter(ours.manager, "default"))
    session = Session()
    session.register(ours, name="model")
    shown = str(session.inspect(intruders=True))
    having = sum(count > 0 for count in counts)
    assert f"{sum(counts)} intruder dimensions among the strongest of each layer in {having} of 4 layers" in shown
    assert "intruder" not in str(session.inspect())
