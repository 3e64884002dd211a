"""Processor time of the commands that a person waits for, on SmolLM2-135M: ``python -m tests.benchmarks.waiting``.

Counts the process's own time, so that other programs do not matter; the model is loaded before. The last column is the
most that a command may take.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from tests.smollm2 import source

LINES: tuple[tuple[str, float], ...] = (
    ("plan model", 3.0),
    ("plan model --device T4", 0.3),
    ("plan model --batch-size 8", 0.3),
    ("plan model --max-length 512", 0.3),
    ("methods model", 1.5),
    ("runs", 0.3),
)
"""Commands in the order in which they run, and the most seconds for each."""
SLIDER = 0.5
"""The most seconds for a new position of a slider of the plan panel."""


def seconds(act: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    begun = time.process_time()
    act()
    return time.process_time() - begun


def measured() -> Iterator[tuple[str, float, float]]:
    """Yields each command with its seconds and the most it may take."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    file = source()
    shell: Any = InteractiveShell.instance()
    shell.user_ns["model"] = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    shell.run_line_magic("load_ext", "nbpeft")
    for line, most in LINES:
        yield f"%lora {line}", seconds(partial(shell.run_line_magic, "lora", line)), most
    from nbpeft.session import get_session

    planner = get_session().memory_planner(shell.user_ns["model"])
    for batch in (6, 16):
        moved = dataclasses.replace(planner.settings, batch_size=batch)
        yield f"slider: batch {batch}", seconds(partial(planner.plan, moved)), SLIDER


def main() -> None:
    """Prints the table."""
    print("| command | CPU seconds | at most |\n|---|---:|---:|")
    for name, took, most in measured():
        print(f"| `{name}` | {took:.2f} | {most} |", flush=True)


if __name__ == "__main__":
    main()
