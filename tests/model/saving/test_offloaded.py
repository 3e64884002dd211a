"""Tensors that are elsewhere between calls of the model."""

from __future__ import annotations

import accelerate

from nbpeft.model.saving.offloaded import adapters_onloaded
from tests.tiny_models import adapted


def test_trained_biases_of_modules_without_an_adapter_are_loaded_too() -> None:
    model = adapted(bias="all")
    wanted = {name: bias.detach().clone() for name, bias in model.manager.base_biases("default").items()}
    accelerate.cpu_offload(model)
    assert all(bias.is_meta for bias in model.manager.base_biases("default").values())
    with adapters_onloaded(model.manager, "default"):
        found = model.manager.base_biases("default")
        assert "model.layers.0.self_attn.k_proj.bias" in found and found.keys() == wanted.keys()
        assert all(bias.equal(wanted[name]) for name, bias in found.items())
