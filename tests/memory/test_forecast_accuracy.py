"""Forecasts against the allocator, over model shapes, dtypes, quantizations and settings."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import statistics
import warnings
from typing import Any

import pytest
import torch

from nbpeft.engine.kernels.numerics import onednn_multiplies
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.memory import forecast
from nbpeft.memory.architecture import architecture_of
from nbpeft.names import LOSS_CHUNK_SIZE
from tests.closeness import assert_approximates
from tests.effort import effort
from tests.memory.measured_peak import SHAPES, real_peak

OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
}


def combinations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Every shape with every dtype and quantization, the other settings drawn at random."""
    draw, sizes = random.Random(seed), random.Random(seed)
    kinds = list(itertools.product(SHAPES, (torch.float32, torch.bfloat16), (None, "nf4", "fp4", "int8")))
    return [
        {
            "shape": shape,
            "dtype": dtype,
            "quantization": quantization,
            "batch_size": draw.choice([1, 2, 4]),
            "max_length": draw.choice([48, 96, 160]),
            "gradient_checkpointing": draw.random() < 0.4,
            "r": draw.choice([2, 8, 32]),
            "lora_dropout": draw.choice([0.0, 0.1]),
            "use_dora": draw.random() < 0.15,
            "optimizer": draw.choice(list(OPTIMIZERS)),
            "training": draw.random() < 0.85,
            "loss_chunk_size": sizes.choice([0, 32, LOSS_CHUNK_SIZE]),
            "recompute": draw.random() < 0.7,
        }
        for shape, dtype, quantization in itertools.islice(itertools.cycle(kinds), count)
    ]


def compare(case: dict[str, Any]) -> tuple[int, int]:
    """(forecast, measured) peak bytes of one combination."""
    adapter = LoraConfig(
        r=case["r"], lora_dropout=case["lora_dropout"], use_dora=case["use_dora"], target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    names = [*("batch_size", "max_length", "dtype", "quantization"), "gradient_checkpointing", "training"]
    names += ["loss_chunk_size", "recompute"]
    settings = {name: case[name] for name in names}
    config = SHAPES[case["shape"]]
    foreseen = forecast(config, adapter, optim=case["optimizer"], device="cpu", **settings).peak_bytes
    measured = real_peak(architecture_of(config, adapter), adapter, optimizer=OPTIMIZERS[case["optimizer"]], **settings)
    return foreseen, measured


def errors_of(cases: list[dict[str, Any]]) -> list[float]:
    return [abs(foreseen - measured) / measured for foreseen, measured in map(compare, cases)]


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "case", combinations(40, seed=1)[::7], ids=lambda case: f"{case['shape']}-{case['quantization']}"
)
def test_a_few(case):
    assert errors_of([case])[0] < 0.1


@pytest.mark.drawn(1)
@pytest.mark.parametrize(("shape", "checkpointing"), [("llama", False), ("gpt2", True)])
def test_packed_rows_take_a_mask_more(shape, checkpointing):
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "batch_size": 2, "max_length": 256, "dtype": torch.float32, "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    config = SHAPES[shape]
    foreseen, plain = (
        forecast(config, adapter, optim="adamw", device="cpu", packing=packing, **settings).peak_bytes
        for packing in (True, False)
    )
    measured = real_peak(architecture_of(config, adapter), adapter, packing=True, **settings)
    assert abs(foreseen - measured) < 0.01 * measured and foreseen > plain


@pytest.mark.drawn(1)
@pytest.mark.parametrize("batch_size", [4, 3])
def test_what_a_cpu_copies_of_the_head_is_counted_on_a_cpu_alone(batch_size):
    # Without oneDNN torch multiplies as on a processor without instructions for bfloat16: it copies nothing.
    with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=batch_size == 4):
        check_copies_of_the_head(batch_size)


def check_copies_of_the_head(batch_size: int) -> None:
    config = copy.deepcopy(SHAPES["llama"])
    config.vocab_size = 8192
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"batch_size": batch_size, "max_length": 48, "training": False, "quantization": None}
    settings |= {"gradient_checkpointing": False}
    copies = {torch.bfloat16: batch_size * 8192 * config.hidden_size * 2 if onednn_multiplies(torch.bfloat16) else 0}
    for dtype in (torch.bfloat16, torch.float32):
        copied = copies.get(dtype, 0)
        on_cpu = forecast(config, adapter, dtype=dtype, device="cpu", **settings).peak_bytes
        elsewhere = forecast(config, adapter, dtype=dtype, device="16GB", **settings).peak_bytes
        measured = real_peak(architecture_of(config, adapter), adapter, optimizer=None, dtype=dtype, **settings)
        assert_approximates(on_cpu, measured, 0.03)
        assert copied / 2 < on_cpu - elsewhere <= copied if copied else on_cpu == elsewhere


@pytest.mark.slow
def test_drawn_combinations():
    # Collections before every measurement would go over all that the libraries made on import.
    gc.collect()
    gc.freeze()
    try:
        errors = errors_of(combinations(effort(16, full=32, long=64)))
    finally:
        gc.unfreeze()
    assert statistics.median(errors) <= 0.03
    assert max(errors) <= 0.10
