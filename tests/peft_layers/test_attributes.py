"""Where PEFT's attributes of wrappers are defined, and that every wrapper has them."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbpeft.peft_layers.commands import PeftWrapper
from nbpeft.peft_layers.copies import PeftCopies
from nbpeft.peft_layers.layers import PeftLayer, PeftParameter

ROOT = Path(__file__).parents[2]
PROVIDERS = (PeftWrapper, PeftLayer, PeftParameter, PeftCopies)


def defined(cls: type) -> set[str]:
    """What a class defines in its own source."""
    (node,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    plain = {target.id for part in node.body if isinstance(part, ast.Assign) for target in part.targets}  # type: ignore[attr-defined]
    return plain | {part.name for part in node.body if isinstance(part, ast.FunctionDef)}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_wrappers_of_the_engine_define_none_of_them(provider: type) -> None:
    wrapper = provider.__bases__[0]
    assert defined(provider) and defined(provider).isdisjoint(defined(wrapper))
    assert all(vars(wrapper)[name] is vars(provider)[name] for name in defined(provider))


def test_a_model_that_is_unpickled_in_a_fresh_process_has_them() -> None:
    """Its file refers to classes of the engine alone."""
    code = (
        "import torch, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "models = torch.load('tests/former/models-0.2.pt', weights_only=False)\n"
        "layers = [m for model, _, _ in models.values() for m in model.modules() if hasattr(m, 'merged_names')]\n"
        "print(len(layers) > 0, all(layer.merged_adapters == [] for layer in layers))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "True"], done.stderr
