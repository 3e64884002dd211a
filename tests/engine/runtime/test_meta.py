"""Models of which only shapes are there, as for counting what a training keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nbpeft
from nbpeft.engine.contract.registry import Method, methods
from tests.tiny_models import llama

FIRST = [
    pytest.param(method, next(iter(method.sample_configs.values())), id=method.peft_type.lower())
    for method in {method.peft_type: method for method in reversed(methods())}.values()
    if method.sample_configs and method.shares.companion is None and not method.transforms_calls
]
"""Each method with the first of its configs; MonteCLoRA, and OFT with shared blocks, look at values."""


@pytest.mark.parametrize(("method", "fields"), FIRST)
def test_a_model_on_the_meta_device_runs_forward_and_backward(method: Method, fields: dict[str, Any]) -> None:
    targets = ["input_layernorm", "norm"] if method.kinds.only else ["q_proj", "v_proj", "down_proj"]
    with torch.device("meta"):
        base = llama()
    model = nbpeft.get_peft_model(base, method.config_class(**{"target_modules": targets, **fields}))
    ids = torch.ones(2, 4, dtype=torch.long, device="meta")
    output = model(input_ids=ids, labels=ids)
    assert output.logits.shape == (2, 4, 97) and output.logits.device.type == "meta"
    output.loss.backward()
    assert {weight.grad.device.type for weight in model.parameters() if weight.grad is not None} == {"meta"}
