"""Drawn configs of LoRA on drawn architectures: injection, a step, files both ways and merging, as in PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.effort import SEED, effort
from tests.engine.methods.lora.drawn_configs import ARCHITECTURES, CHUNK, Case, compare, each

DRAWS = effort(quick=25, full=150, long=2_000) or 0


@pytest.mark.parametrize("chunk", range(-(-DRAWS // CHUNK)))
def test_a_drawn_config_does_what_it_does_in_peft(chunk: int, tmp_path: Path) -> None:
    outcomes: list[str] = []

    def use(case: Case) -> None:
        torch.manual_seed(0)
        folder = tmp_path / str(len(outcomes))
        folder.mkdir()
        outcomes.append(compare(case, folder))

    each(1_000_000 * SEED + chunk, min(CHUNK, DRAWS - chunk * CHUNK), use)
    assert outcomes.count("equal") >= len(outcomes) // 4, outcomes


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_each_architecture_can_be_adapted(name: str, tmp_path: Path) -> None:
    """So that draws that both libraries refuse are those of impossible fields."""
    kind = ARCHITECTURES[name]
    fields = {"r": 2, "target_modules": [kind.names[0]], "init_lora_weights": True, "task_type": kind.task_type}
    assert compare(Case(name, fields), tmp_path) == "equal"
