"""Saving adapters of models that are sharded over two processes, on the ways that scripts take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_shards_are_saved_by_one_process_and_wrapped_attention_is_listed_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/model/saving/two_processes.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # a process that waits for the other one for ever
    )
    assert done.returncode == 0, done.stderr[-3000:]
