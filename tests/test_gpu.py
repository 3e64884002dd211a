"""Everything that a GPU is used for, on a pretended one: no device is mixed with another, no step waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_scenarios import scenarios
from tests.pretend_gpu import AVAILABLE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Scenario -> what went wrong in it; in a process of its own, since the device cannot be taken away again."""
    told = tmp_path_factory.mktemp("gpu") / "failures.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_scenarios", str(told)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads(told.read_text())
    return found


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="this torch has no devices written in Python")
@pytest.mark.parametrize("name", scenarios)
def test_on_a_gpu(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]
