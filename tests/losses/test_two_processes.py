from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.closeness import assert_close
from tests.losses.two_processes import ADAPTERS, WRAPPINGS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_sharded_and_replicated_models_learn_the_same_in_chunks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = str(ROOT / "tests/losses/two_processes.py")
    done = subprocess.run(
        [*command, script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(found) == len(ADAPTERS) * len(WRAPPINGS)
        for name, (whole, chunked) in found.items():
            assert_close(chunked, whole, message=name)
            assert whole[0] != whole[-1]
