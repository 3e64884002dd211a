"""The reference of public names: up to date, and complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbpeft

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def test_the_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, NOTEBOOKS / "reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_every_class_and_function_is_in_it() -> None:
    text = (NOTEBOOKS / "reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^### `(\w+)`$", text, re.MULTILINE))
    made = {"LoraModel"}  # by a call, so that the sources alone do not tell what it is
    assert {name for name in nbpeft.__all__ if callable(getattr(nbpeft, name))} - made == named
