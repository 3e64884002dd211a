"""Libraries that are tested with nbpeft and not installed beside it: they lie in a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DIFFUSERS = ("diffusers==0.42.1", "importlib_metadata==10.2.0", "zipp==4.1.2")
LLAMA_CPP = ("xllamacpp==2026.10.11549",)
"""llama.cpp with its Python interface, as wheels."""
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nbpeft-tests"


def installed(*requirements: str) -> Path:
    """Where packages lie, without what they need; the test is skipped where there is no index.

    Args:
        requirements: name and version of each, ``trl==1.16.0``; the first names the folder.
    """
    folder = _CACHE / requirements[0].replace("==", "-")
    done = folder / ".complete"
    if not done.is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        ran = subprocess.run(
            [*command, "--upgrade", "--target", str(folder), *requirements], capture_output=True, text=True, timeout=300
        )
        if ran.returncode:
            reason = (ran.stderr.strip().splitlines() or ["pip failed"])[-1]
            pytest.skip(f"{' '.join(requirements)} cannot be installed: {reason:.200}")
        done.touch()
    return folder
