"""The thread that measures memory."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import time
import torch
from nbpeft.widgets.live_memory import LiveMemory

weight = torch.ones(600, 600)

def measure():
    while time.monotonic() < end:  # inside torch when the interpreter ends
        weight @ weight

end = time.monotonic() + 1.0
live = LiveMemory(measure, lambda memory: None)
live.look(running=True)
time.sleep(0.2)
"""


def test_a_process_that_ends_during_a_measurement_ends_without_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
