"""What is told of a processor that has no instructions for half precision."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from nbpeft.memory import processor
from nbpeft.model.quantization.quantize import usual_dtype
from tests.pretend_cpu import pretend_cpu


def test_processors_of_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    half, other = torch.bfloat16, torch.float16
    for onednn, instructions, slow in (
        (set(), set(), {half, other}),
        ({half}, {"avx512"}, {half, other}),
        ({half}, {"avx512", "avx512_bf16"}, {other}),
        ({half}, set(), {other}),  # ARM
        ({half, other}, {"avx512", "avx512_bf16"}, set()),
    ):
        pretend_cpu(monkeypatch, onednn=onednn, instructions=instructions)
        assert {dtype for dtype in (half, other, torch.float32) if processor.slow_here(dtype)} == slow
        assert usual_dtype() == (torch.float32 if half in slow else half)


def test_what_torch_does_not_tell_is_not_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert processor.has_instructions(torch.bfloat16) is None
    assert not processor.slow_here(torch.bfloat16) and usual_dtype() == torch.float32


def test_a_model_is_slow_in_the_dtype_of_most_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu(monkeypatch)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    assert processor.slow_dtype(model) is None
    model[0].to(torch.bfloat16)
    assert processor.slow_dtype(model) == torch.bfloat16
    setattr(model[0], "compute_dtype", torch.float32)  # noqa: B010 - as layers in 4 bits say it
    assert processor.slow_dtype(model) is None
    assert processor.slow_dtype(nn.Linear(8, 8, device="meta", dtype=torch.float16)) is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert processor.slow_dtype(nn.Linear(8, 8, dtype=torch.float16)) is None


@pytest.mark.slow
def test_what_onednn_is_told_to_pass_over_is_not_there() -> None:
    code = "import torch; from nbpeft.memory.processor import has_instructions; print(has_instructions(torch.bfloat16))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("False", "None")
