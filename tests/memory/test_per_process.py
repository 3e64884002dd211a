"""What one of several processes needs of a step."""

from __future__ import annotations

import pytest
from torch import nn

from nbpeft import LoraConfig
from nbpeft.errors import ConfigError
from nbpeft.memory import forecast
from nbpeft.session import Session
from tests.tiny_models import llama

CONFIG = LoraConfig(r=4, target_modules="all-linear")


def parts(**settings: object) -> dict[str, int]:
    found = forecast(llama(), CONFIG, batch_size=2, max_length=16, **settings)
    return {part.name: part.byte_count for part in found.parts}


def test_each_process_of_ddp_has_the_whole_and_buckets_of_gradients() -> None:
    alone, one_of_two = parts(), parts(processes=2)
    buckets = one_of_two.pop("gradient buckets")
    assert one_of_two == alone and buckets == alone["adapters"] > 0
    assert parts(processes=1) == alone


def test_sharded_processes_share_weights_optimizer_and_gradients() -> None:
    alone, one_of_four = parts(), parts(processes=4, fsdp=True)
    for name in ("base weights", "adapters", "optimizer", "gradients"):
        assert one_of_four[name] == -(-alone[name] // 4)
    assert 0 < one_of_four["gathered weights"] <= alone["base weights"]
    unshared = {"activations", "temporary"} & alone.keys()
    assert all(one_of_four[name] == alone[name] for name in unshared)


def test_codes_of_four_bits_are_shared_and_their_constants_are_not() -> None:
    alone, one_of_four = parts(quantization="nf4"), parts(quantization="nf4", processes=4, fsdp=True)
    linear = [layer for layer in llama().model.layers.modules() if isinstance(layer, nn.Linear)]
    codes = sum(layer.weight.numel() // 2 for layer in linear)
    dense = sum(part.nbytes for part in llama().parameters()) - sum(layer.weight.nbytes for layer in linear)
    buffers = sum(part.nbytes for part in llama().buffers())
    shared = codes + dense + buffers
    assert one_of_four["base weights"] == alone["base weights"] - shared + -(-shared // 4)


def test_weights_in_eight_bits_stay_whole() -> None:
    alone, one_of_four = parts(quantization="int8"), parts(quantization="int8", processes=4, fsdp=True)
    assert alone["base weights"] / 4 < one_of_four["base weights"] < alone["base weights"]


def test_a_plan_says_for_how_many_processes_it_is() -> None:
    session = Session()
    plan = session.plan(llama(), batch_size=2, max_length=16, processes=2, fsdp=True, suggest=False)
    assert str(plan.settings).endswith("adamw, one of 2 sharded processes")
    with pytest.raises(ConfigError, match="processes is 0; expected a whole number of at least 1"):
        session.plan(llama(), processes=0)
