"""Training on a base in 4 bits."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, percent, printed, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def test_02_learns_on_a_base_in_4_bits(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "02_qlora_training.ipynb", 4)
    last = next(i for i, cell in enumerate(notebook.cells) if "score" in cell.metadata.get("tags", ()))
    notebook.cells = notebook.cells[: last + 1]
    base, adapter = re.findall(r"4-bit base with.*: ([\d.]+)% right of 64", printed(execute(notebook, tmp_path)))
    assert float(base) < 20 and float(adapter) >= 80


def test_02_forecasts_saves_reloads_and_merges(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "02_qlora_training.ipynb", 4)
    found = summary(execute(notebook, tmp_path, NBPEFT_STEPS="2", NBPEFT_TEST_ORDERS="4"))
    assert 0.25 < float(found["quantized layers"].split()[0]) <= 0.27
    assert abs(percent(found["error of the forecast"])) < 6
    copied, rounded = (
        float(found[f"merge error in {where}"].split()[0].replace(",", "")) for where in ("the copy", "4 bits")
    )
    assert 0 <= copied < rounded  # both are what rounding leaves, which may be nothing in float32
    assert found["training"].endswith("for 2 steps")
    shown = [cell.outputs[-1].data["text/plain"] for cell in notebook.cells if cell.source.startswith("%%qlora")]
    dry, done = (re.findall(r"210 layers in nf4 double: .*?; the rest .*?;", text) for text in shown)
    assert dry == done and len(done) == 1, "what the dry run foretold"
    assert (tmp_path / "adapters" / "orders-4bit" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged-orders-4bit" / "tokenizer.json").is_file()
    told = printed(notebook)
    assert "Out of memory in forward after 0 steps, at batch size 16 and" in told
    assert "gradient_checkpointing=True saves" in told and "per_device_train_batch_size 16 -> 8 saves" in told
    warned = [
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"
    ]
    assert [line for text in warned for line in text.splitlines() if "MatMul8bitLt" in line and "(280 times)" in line]
    assert "".join(warned).count("MatMul8bitLt") == 1


@pytest.mark.slice
def test_02_ships_the_results_of_a_full_run() -> None:
    found = summary(nbformat.read(NOTEBOOKS / "02_qlora_training.ipynb", 4))
    assert found["test orders"] == "64" and percent(found["score base in 4 bits"]) < 20
    ways = ("adapter", "adapter on a fresh 4-bit base", "adapter on the full-precision base", "merged into a copy")
    assert all(percent(found[f"score {way}"]) >= 80 for way in ways)
