"""ZeRO in two processes, where DeepSpeed is installed: trained, saved and gone on with as in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.closeness import assert_close
from tests.training.deepspeed_run import run
from tests.training.launch.test_launch import close

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_learns_saves_and_resumes_what_one_process_does(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed")
    expected = run(tmp_path / "one", 0)
    whole = load_file(tmp_path / "one/adapter/adapter_model.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch.append(str(ROOT / "tests/training/deepspeed_run.py"))
    for place, checkpoint in (("first", []), ("again", [str(tmp_path / "first/checkpoint-2")])):
        command = [*launch, str(tmp_path / place), str(stage), *checkpoint]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert_close(json.loads((tmp_path / place / "losses.json").read_text()), expected)
        close(load_file(tmp_path / place / "adapter/adapter_model.safetensors"), whole)
