"""Training on two processes: the same adapter in both, and Stop in one ends both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.closeness import assert_close
from tests.training.two_processes import own_loop, sharded_loop

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_train_one_adapter_and_stop_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "tests/training/two_processes.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert_close(first["loop"], second["loop"])
    assert_close(first["loop"], own_loop(0, 1))
    for sharded, use_dora in zip(first["sharded"], (False, True), strict=True):
        assert_close(sharded, sharded_loop(use_dora))
    assert first["trainer"]["steps"] == second["trainer"]["steps"] == 5
    assert_close(first["trainer"]["weights"], second["trainer"]["weights"])
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    kept = sorted(path.name for path in (tmp_path / "trainer").iterdir())
    assert kept[:2] == ["checkpoint-2", "checkpoint-4"]
    assert first["trainer"]["resumes"] == second["trainer"]["resumes"] == "checkpoint-2"
    for name in kept:
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (tmp_path / "trainer" / name).iterdir()}
