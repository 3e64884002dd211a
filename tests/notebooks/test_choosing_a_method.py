"""Five methods on one task."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import LAYERS, NOTEBOOKS, PARAMETERS, execute, number, replaced, shortened, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "10_choosing_a_method.ipynb"


def test_10_trains_five_methods_and_ships_one_as_a_lora(tmp_path: Path, shallow: dict[str, str]) -> None:
    less = {"in range(5):": "in range(1):", "general=True, **settings": "also=held_out, **settings"}
    short = replaced(shortened(nbformat.read(NOTEBOOK, 4), steps=1, rows=2), less)
    notebook = execute(short, tmp_path, **shallow)
    found = summary(notebook)
    counts = {title: count * LAYERS // 30 for title, count in PARAMETERS.items()}
    assert {title: number(found[f"parameters {title}"]) for title in PARAMETERS} == counts
    memory = {title: number(found[f"memory {title}"]) for title in PARAMETERS}
    assert min(memory, key=memory.__getitem__) == "MiSS" and max(memory, key=memory.__getitem__) == "VeRA"
    assert all(number(found[f"a step {title}"]) > 0 for title in PARAMETERS)
    assert set(found) == {"symbols right OFT as LoRA", "loss on general text base"} | {
        f"{what} {title}"
        for what in ("symbols right", "words right", "loss on general text", "parameters", "memory", "a step")
        for title in PARAMETERS
    }
    config = json.loads((tmp_path / "shipped" / "sounds" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 64
