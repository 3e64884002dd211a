"""A kernel that is killed while it trains, again and again, and what a new one makes of it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from nbpeft.runs.store import RunStore
from tests.closeness import assert_close
from tests.effort import effort

ROOT = Path(__file__).resolve().parent.parent.parent
KILLS = effort(quick=2, full=2, long=20)
PREPARE = """\
%load_ext nbpeft
import torch
from tests.tiny_models import llama
from tests.training.support import token_rows
from nbpeft.training.monitor import run_checkpointer
run_checkpointer.SHORTEST = 0.5
model, rows = llama(), token_rows(24)
"""
ADAPT = """\
torch.manual_seed(11)
%lora add model --name sql r=4 lora_dropout=0.2
"""
TRAIN = """\
%%lora_train model --data rows
max_steps = STEPS
per_device_train_batch_size = 4
learning_rate = 0.01
logging_steps = 1"""


class Kernel:
    """A kernel of its own process, in a folder."""

    def __init__(self, folder: Path) -> None:
        own = {"PYTHONPATH": str(ROOT), "NBPEFT_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
        self.manager = KernelManager()
        self.manager.start_kernel(cwd=str(folder), env={**os.environ, **own})
        self.client: Any = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def begin(self, code: str) -> None:
        self.client.execute(code)

    def run(self, code: str) -> str:
        """What a cell shows and prints; fails where it raises."""
        outputs: list[str] = []

        def take(message: Any) -> None:
            content = message["content"]
            assert message["msg_type"] != "error", "\n".join(content["traceback"])
            outputs.append(content.get("text") or content.get("data", {}).get("text/plain", ""))

        self.client.execute_interactive(code, timeout=240, output_hook=take)
        return "\n".join(outputs)

    def kill(self) -> None:
        assert self.manager.provisioner is not None
        os.kill(self.manager.provisioner.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        self.close()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    made = Kernel(folder)
    try:
        yield made
    finally:
        made.close()


def wait_for_step(store: RunStore, step: int) -> Any:
    """The run when the line of a step is in its curve."""
    for _ in range(1200):
        for record in store.records():
            if any(entry.get("step", 0) >= step for entry in store.find(record.name).entries()):
                return record
        time.sleep(0.1)
    raise AssertionError("the kernel did not train")


def losses(store: RunStore, name: str) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in store.find(name).entries() if "loss" in entry}


@pytest.mark.slow
def test_a_kernel_that_is_killed_again_and_again_goes_on_each_time(tmp_path: Path) -> None:
    """It loses what came after the last state, and the numbers are those of a run that nothing broke off."""
    (tmp_path / "broken").mkdir(), (tmp_path / "whole").mkdir()
    step, store = 12, RunStore(tmp_path / "broken" / "runs")
    train = TRAIN.replace("STEPS", str(30 * (KILLS + 1)))
    for number in range(KILLS):
        broken = Kernel(tmp_path / "broken")
        broken.run(PREPARE + (ADAPT if number == 0 else ""))
        broken.begin(train if number == 0 else "%lora resume")
        record = wait_for_step(store, step)
        broken.kill()
        (record,) = store.records()
        assert record.status == "crashed"
        reached, kept = max(losses(store, record.name)), record.kept_steps[0]
        seconds = {entry["step"]: entry["seconds"] for entry in store.find(record.name).entries()}
        assert seconds[reached] - seconds.get(kept, 0.0) <= 30.0
        step = reached + 12
    with kernel(tmp_path / "broken") as last:
        last.run(PREPARE)
        told = last.run("%lora resume")
        assert re.search(r"resumed sql-1 at step \d+: sql finished · ", told), told
    with kernel(tmp_path / "whole") as straight:
        straight.run(PREPARE + ADAPT)
        straight.run(train)
    through, ended = losses(RunStore(tmp_path / "whole" / "runs"), "sql-1"), losses(store, "sql-1")
    assert through.keys() == ended.keys()
    assert_close(ended, through)
