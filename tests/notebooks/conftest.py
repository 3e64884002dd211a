"""A fifth of the real model's layers, for notebooks of which it is tested that they work and not what they learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nbpeft import examples
from tests.notebooks.support import LAYERS

WEIGHTS, LAYER = "model.safetensors", "model.layers."


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a notebook whose ``examples.small_model()`` has the first layers alone."""
    whole, cache = Path(examples.small_model_path()), tmp_path_factory.mktemp("cache")
    folder = cache / whole.name
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(WEIGHTS))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    tensors = {
        name: tensor
        for name, tensor in load_file(whole / WEIGHTS).items()
        if not name.startswith(LAYER) or int(name.removeprefix(LAYER).partition(".")[0]) < LAYERS
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return {"NBPEFT_CACHE": str(cache)}
