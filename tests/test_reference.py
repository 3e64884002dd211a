"""The reference of public names, which its command writes: complete, and with signatures and docstrings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbpeft

COMMAND = Path(__file__).resolve().parent.parent / "notebooks" / "reference.py"


def test_every_class_and_function_is_in_it(tmp_path: Path) -> None:
    page = tmp_path / "reference.md"
    done = subprocess.run([sys.executable, COMMAND, "--to", page], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    text = page.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `(\w+)`$\n(.*?)(?=^###? |\Z)", text, re.MULTILINE | re.DOTALL))
    made = {"AdaptionPromptModel", "LoraModel"}  # by calls, so that the sources alone do not show what they are
    assert {name for name in nbpeft.__all__ if callable(getattr(nbpeft, name))} - made == sections.keys()
    assert all(section.strip() for section in sections.values())
    assert "```python\ntrain(\n    model: nn.Module,\n" in sections["train"]
    assert "Training rows or their source" in sections["train"]
