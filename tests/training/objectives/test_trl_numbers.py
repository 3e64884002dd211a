"""Losses, norms of gradients and curves of ten steps, as TRL's Trainers with PEFT have them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.closeness import assert_close
from tests.training.objectives.nbpeft_run import IN_HALF, IN_TWO_PROCESSES, OBJECTIVES, RECORDED, curves
from tests.training.objectives.trl_run import CASES

torch.set_num_threads(1)


def same(case: str, theirs: dict[str, list[float]], dtype: torch.dtype = torch.float32, **how: Any) -> None:
    """Rewards, margins and KL are differences of sums of log-probabilities, which a nat is a small size for."""
    for name, found in curves(case, theirs, half=dtype == torch.float16, **how).items():
        assert_close(found, theirs[name], scale=max(1.0, *map(abs, theirs[name])), dtype=dtype, message=name)


def recorded(case: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads(RECORDED.read_text("utf-8"))[case]
    return found


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_have_the_recorded_numbers_of_trl(case: str) -> None:
    same(case, recorded(case))


@pytest.mark.parametrize("batches", [2, 4])
@pytest.mark.parametrize("case", [case for case in CASES if "accumulated" not in case])
def test_a_batch_that_is_divided_has_the_numbers_of_the_whole_one(case: str, batches: int) -> None:
    same(case, recorded(case), batches=batches)


@pytest.mark.parametrize("case", OBJECTIVES)
def test_recomputed_activations_have_the_same_numbers(case: str) -> None:
    same(case, recorded(case), gradient_checkpointing=True)


@pytest.mark.parametrize("case", IN_HALF)
def test_a_base_in_float16_has_the_numbers_of_float32_up_to_its_rounding(case: str) -> None:
    same(case, recorded(case), torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_TWO_PROCESSES)
def test_two_processes_have_the_numbers_of_one(case: str) -> None:
    same(case, recorded(case), processes=2)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_ten_steps_have_the_numbers_of_the_installed_trl(tmp_path: Path) -> None:
    script, results = Path(__file__).with_name("trl_run.py"), tmp_path / "results.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, str(script), str(results)], check=True, env=environment)
    for case, theirs in json.loads(results.read_text("utf-8")).items():
        same(case, theirs)
