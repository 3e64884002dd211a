"""Surfaces against full simulations: other batch sizes, lengths and ranks must come out the same."""

from __future__ import annotations

import copy
import random
import threading
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.memory import forecast
from nbpeft.memory.forecast import simulated, surveyed
from nbpeft.memory.surface import at, point_of, surface_of
from nbpeft.memory.trace import FIRST, SECOND, IrregularError, Log, Point, Trace
from tests.effort import drawn
from tests.memory.measured_peak import SHAPES

POINTS = [Point(1, 96, 8), Point(3, 77, 64), Point(4, 512, 4)]
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}),
    ("llama", {"gradient_checkpointing": True, "quantization": "nf4", "dtype": "bfloat16"}, {"lora_dropout": 0.1}),
    ("qwen2", {"quantization": "int8", "gradient_checkpointing": True, "dtype": "bfloat16"}, {}),
    ("qwen3", {"dtype": "bfloat16"}, {"use_dora": True}),
    ("gemma", {"quantization": "fp4"}, {"target_modules": ["q_proj", "v_proj"]}),
    ("gpt2", {"gradient_checkpointing": True}, {"lora_dropout": 0.1}),
    ("gpt2", {"training": False, "dtype": "bfloat16"}, {}),
]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)


@pytest.mark.parametrize(("shape", "settings", "options"), drawn(CASES, quick=2))
def test_other_sizes_come_out_as_simulated(shape, settings, options):
    setting = forecast(SHAPES[shape], lora(**options), **settings).setting
    surface = surface_of(setting)
    assert surface is not None
    for point in POINTS:
        wanted = at(setting, point)
        fast, full = surveyed(surface, wanted, "adamw", None), simulated(wanted, "adamw", None)
        assert abs(fast.peak_bytes - full.peak_bytes) <= 0.01 * full.peak_bytes
        for one, other in zip(fast.parts, full.parts, strict=True):
            assert one.name == other.name
            assert abs(one.byte_count - other.byte_count) <= 0.01 * full.peak_bytes


def test_a_model_with_layers_of_two_kinds():
    config = copy.deepcopy(SHAPES["llama"])
    setting = forecast(config, lora(target_modules=["q_proj", "o_proj"], layers_to_transform=[3])).setting
    surface = surface_of(setting)
    assert surface is not None and len(surface.traces) == 1
    for point in POINTS:
        wanted = at(setting, point)
        full = simulated(wanted, "adamw", None)
        assert abs(surveyed(surface, wanted, "adamw", None).peak_bytes - full.peak_bytes) <= 0.01 * full.peak_bytes


def test_without_an_adapter_and_with_patterns_the_rank_stays():
    for adapter in (None, lora(rank_pattern={"q_proj": 2})):
        setting = forecast(SHAPES["llama"], adapter, batch_size=2, sequence_length=40).setting
        surface = surface_of(setting)
        assert surface is not None
        full = simulated(setting, "sgd", None)
        assert abs(surveyed(surface, setting, "sgd", None).peak_bytes - full.peak_bytes) <= 0.01 * full.peak_bytes
        assert at(setting, Point(1, 1, 99)).adapter_config == adapter


def test_a_move_is_answered_without_a_simulation(monkeypatch):
    setting = forecast(SHAPES["llama"], lora()).setting
    surface = surface_of(setting)
    assert surface is not None
    draw = random.Random(0)
    monkeypatch.setattr(FakeTensorMode, "__enter__", lambda mode: pytest.fail("a simulation began"))
    for _ in range(50):
        wanted = at(setting, Point(draw.randint(1, 64), draw.randint(16, 8192), draw.choice([4, 8, 16, 32, 64, 128])))
        assert surveyed(surface, wanted, "adamw", 10**9).peak_bytes > 0
    with pytest.raises(pytest.fail.Exception, match="a simulation began"):
        simulated(wanted, "adamw", None)


def test_beside_the_main_thread_nothing_that_all_threads_share_changes():
    config = copy.deepcopy(SHAPES["qwen3"])
    config.intermediate_size = 320
    adapter = lora(lora_dropout=0.1)
    setting = forecast(config, adapter, dtype="bfloat16", gradient_checkpointing=True).setting
    seen, stop, made = set(), threading.Event(), []

    def prepare() -> None:
        made.append(surface_of(setting))
        stop.set()

    torch.manual_seed(3)
    state = torch.get_rng_state()
    thread = threading.Thread(target=prepare)
    thread.start()
    while not stop.wait(0.002):
        seen.add(torch.get_default_dtype())
    thread.join()
    assert seen == {torch.float32}
    assert torch.equal(torch.get_rng_state(), state)
    full = simulated(setting, "adamw", None)
    assert abs(surveyed(made[0], setting, "adamw", None).peak_bytes - full.peak_bytes) <= 0.01 * full.peak_bytes


def log_of(*sizes: int, kind: str = "made") -> Log:
    log = Log()
    for size in sizes:
        log.add(kind, size)
    return log


def test_sizes_that_are_no_product_are_noticed():
    with pytest.raises(IrregularError, match="no product"):
        Trace(log_of(1000), log_of(1234))
    with pytest.raises(IrregularError, match="other things"):
        Trace(log_of(8), log_of(8, 8))
    with pytest.raises(IrregularError, match="other things"):
        Trace(log_of(8), log_of(8, kind="gradient"))


def test_exponents_are_found():
    def size(point: Point) -> int:
        return 3 * point.batch_size * point.sequence_length**2

    trace = Trace(log_of(size(FIRST), 16), log_of(size(SECOND), 16))
    for point in POINTS:
        assert trace.peaks(point)[0].total == size(point) + 16


def test_points_of_settings():
    setting = forecast(SHAPES["llama"], lora(r=4), batch_size=2, sequence_length=40).setting
    assert point_of(setting) == Point(2, 40, 4)
    assert at(setting, point_of(setting)) == setting
