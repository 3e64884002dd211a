"""How long the first import takes, each in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.harness import OURS, Measure, Row, Size

ROOT = Path(__file__).resolve().parent.parent.parent
TORCH = "import torch, transformers"


def fresh_interpreter(statements: str) -> float:
    """Seconds the statements take in a new interpreter, its own start not counted."""
    code = f"import time\nstart = time.perf_counter()\n{statements}\nprint('TOOK', time.perf_counter() - start)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=True
    )
    return float(done.stdout.split("TOOK ")[-1])


def load_extension(name: str, size: Size) -> Measure:
    """``%load_ext nbpeft`` in a shell that is there, beside ``import peft``."""
    if name != OURS:
        return lambda: fresh_interpreter(f"import {name}")
    shell = "from IPython.core.interactiveshell import InteractiveShell; shell = InteractiveShell.instance()"
    load = "start = time.perf_counter(); shell.run_line_magic('load_ext', 'nbpeft')"
    return lambda: fresh_interpreter(f"{shell}\n{load}")


def import_only(name: str, size: Size) -> Measure:
    """``import nbpeft`` beside ``import peft``."""
    return lambda: fresh_interpreter(f"import {name}")


def first_use(name: str, size: Size) -> Measure:
    """What a script imports, beside what it would import anyway."""
    ours = "from nbpeft import LoraConfig, PeftModel, get_peft_model"
    return lambda: fresh_interpreter(ours if name == OURS else name)


ROWS = [
    Row("load_ext", "`%load_ext nbpeft` / `import peft`", "seconds", 0.15, load_extension, absolute=True, repeats=3),
    Row("import", "`import nbpeft` / `import peft`", "seconds", 0.15, import_only, absolute=True, repeats=3),
    Row("first-use", "first use / import torch, transformers", "seconds", 1.2, first_use, rival=TORCH, repeats=3),
]
