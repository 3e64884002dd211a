"""Runs code in a process of its own: in this one other tests import PEFT itself."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


def python(*arguments: str, folder: Path = ROOT, **variables: str) -> str:
    """What ``python`` with these arguments prints; it has to end well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **QUIET, **variables},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.strip()


def run(code: str, folder: Path = ROOT) -> str:
    """What code prints; it may assert."""
    return python("-W", "ignore", "-c", textwrap.dedent(code), folder=folder)
