"""LoRA's product by the modules that hooks are on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbpeft.model import LoraConfig, get_peft_model


def test_an_observed_step_computes_in_the_dtype_of_the_factors() -> None:
    base = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    model: Any = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False))
    x, seen = torch.randn(2, 8, dtype=torch.bfloat16), []
    expected = model(x)
    for part in ("lora_A", "lora_B"):
        module = getattr(model.base_model.model[0], part)["default"]
        module.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    assert torch.equal(model(x), expected)
    assert seen == [(torch.float32, torch.float32)] * 2
