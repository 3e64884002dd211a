from __future__ import annotations

import subprocess
import sys

import nbpeft.training


def test_every_public_name_is_found():
    for name in nbpeft.training.__all__:
        assert callable(getattr(nbpeft.training, name))
    assert not hasattr(nbpeft.training, "no_such_name")


def test_tracking_a_loop_imports_torch_only():
    code = (
        "import sys\n"
        "from nbpeft.training import RunControl, track\n"
        "heavy = {'transformers', 'accelerate', 'datasets', 'peft', 'IPython', 'ipywidgets', 'matplotlib'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
