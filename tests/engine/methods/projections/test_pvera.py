"""PVeRA's draws: those of peft, in training and where asked for in evaluation, and once for each call."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nbpeft
from nbpeft.engine.contract.registry import methods
from nbpeft.engine.methods.projections import pvera
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, randomize, tokens

FIELDS: dict[str, Any] = {"r": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def made(**fields: Any) -> PeftModel:
    model = get_peft_model(llama(), nbpeft.PveraConfig(**FIELDS, **fields))
    randomize(model, scale=0.3)
    return model.eval()


def loss_of(model: Any, seed: int = 0) -> Tensor:
    ids = tokens(seed=seed)
    loss: Tensor = model.train()(input_ids=ids, labels=ids).loss
    return loss


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("fields", [{}, {"generator_seed": 5}, {"pvera_dropout": 0.3}], ids=["torch", "own", "dropout"])
@pytest.mark.parametrize("sampled", [False, True])
def test_it_draws_as_peft_does(fields: dict[str, Any], sampled: bool, tmp_path: Path) -> None:
    model = made(**fields, sample_at_inference=sampled)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    found = []
    for one in (model, theirs):
        torch.manual_seed(3)
        evaluated = [logits(one), logits(one)]
        assert torch.equal(*evaluated) != sampled
        loss = loss_of(one)
        loss.backward()
        own = {name.replace(".default", ""): value for name, value in gradients(one).items()}
        found.append([*evaluated, loss.detach(), *(own[name] for name in sorted(own))])
    assert len(found[0]) == len(found[1]) == 3 + 12
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize("seed", [None, 5])
def test_what_checkpointing_computes_again_has_the_same_numbers(seed: int | None) -> None:
    found = []
    for settings in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = made(generator_seed=seed)
        if settings is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(settings)
        torch.manual_seed(1)
        loss_of(model).backward()
        (loss_of(model, 1) + loss_of(model, 2)).backward()  # two calls wait for their backward
        found.append(gradients(model))
    for other in found[1:]:
        for name, expected in found[0].items():
            assert_close(other[name], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_many_calls_wait_for_their_backward_or_are_refused(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_for(calls: int, *, again: bool = True) -> Tensor:
        torch.manual_seed(0)
        config = nbpeft.PveraConfig(r=2, target_modules=["0"], generator_seed=3, init_weights=False)
        model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config).train()
        x = torch.ones(2, 4, requires_grad=True)
        outputs = [checkpoint(model, x, use_reentrant=reentrant) if again else model(x) for _ in range(calls)]
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
        assert x.grad is not None
        return x.grad

    assert_close(wait_for(40), wait_for(40, again=False))
    monkeypatch.setattr(pvera, "_CALLS", 3)
    assert_close(wait_for(3), wait_for(3, again=False))
    with pytest.raises(TrainingError, match=r"a layer's last 3 calls, .* call backward\(\) sooner"):
        wait_for(4)
    wait_for(4, again=False)


def test_a_copy_goes_on_where_the_adapter_is() -> None:
    model = made(generator_seed=5)
    loss_of(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = [loss_of(model).item() for _ in range(2)]
    assert expected[0] != expected[1]
    assert all([loss_of(twin).item() for _ in range(2)] == expected for twin in twins)


def test_the_mean_is_merged_and_converted() -> None:
    model = made(sample_at_inference=True, generator_seed=1)
    mean = made()
    assert_close(logits(model.merge_and_unload()), logits(mean))
    expected = logits(mean)
    config, state = nbpeft.convert_to_lora(mean, rank=6)
    lora = get_peft_model(llama(), config)
    nbpeft.set_peft_model_state_dict(lora, state)
    assert_close(logits(lora.eval()), expected)


def test_defaults_and_refusals() -> None:
    method = next(method for method in methods() if method.label == "PVeRA")
    assert all(set(method.default_targets(kind) or ()) == set(DEFAULTS[kind]) for kind in ("phi", "dinov2", "bert"))
    with pytest.raises(ConfigError, match="generator_seed must be a whole number from 0"):
        nbpeft.PveraConfig(generator_seed=-1)
