"""The notebooks, executed in a kernel as a reader would: in full, and twice in one kernel."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

MEASURE = """
import gc as _gc
_gc.collect()
import torch as _torch
print("live", sum(_t.untyped_storage().nbytes() for _t in {
    _t.untyped_storage().data_ptr(): _t for _t in _gc.get_objects() if issubclass(type(_t), _torch.Tensor)
}.values()))
"""


def execute(notebook: Any, folder: Path, **environment: str) -> Any:
    """Runs a notebook in its own kernel; environment variables shorten it."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        client = NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            store_widget_state=False,
        )
        client.execute()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return notebook


def printed(notebook: Any) -> str:
    """Everything the cells wrote to standard output."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def summary(notebook: Any) -> dict[str, str]:
    """The ``key: value`` lines of the cell tagged ``summary``."""
    cell = next(cell for cell in notebook.cells if "summary" in cell.metadata.get("tags", ()))
    lines = "".join(output.text for output in cell.outputs).splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def percent(value: str) -> float:
    return float(value.rstrip("%"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder, so that notebook 03 finds what notebook 01 saved."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.xdist_group("notebooks 01 and 03")
def test_01_teaches_what_the_base_model_cannot_do(shared: Path) -> None:
    found = summary(execute(nbformat.read(NOTEBOOKS / "01_lora_finetuning.ipynb", 4), shared))
    assert percent(found["score base"]) < 20
    assert percent(found["score adapter"]) >= 80
    assert found["score adapter"] == found["score adapter loaded"] == found["score adapter merged"]
    size = float(found["adapter on disk"].removesuffix(" MB"))
    assert 0.5 < size < 10


@pytest.mark.xdist_group("notebooks 01 and 03")
def test_03_answers_alike_with_the_adapter_merged_and_shipped(shared: Path) -> None:
    found = summary(execute(nbformat.read(NOTEBOOKS / "03_adapter_inference.ipynb", 4), shared))
    assert percent(found["score base"]) < 20
    assert percent(found["score adapter"]) >= 75
    same, total = map(int, found["same answers after merging"].split(" of "))
    assert same == total
    assert found["same answers after shipping"] == f"{total} of {total}"


@pytest.mark.xdist_group("notebook 01")
def test_01_twice_in_one_kernel_keeps_no_memory(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "01_lora_finetuning.ipynb", 4)
    once = [cell for cell in notebook.cells if cell.cell_type == "code"]
    measure = nbformat.v4.new_code_cell(MEASURE)
    notebook.cells = [*once, measure, *[cell.copy() for cell in once], measure.copy()]
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
    execute(notebook, tmp_path, NBPEFT_STEPS="2", NBPEFT_TEST_ORDERS="4")
    first, second = (int(value) for value in re.findall(r"^live (\d+)$", printed(notebook), re.MULTILINE))
    assert second <= first * 1.02 + 1e6


@pytest.mark.xdist_group("notebook 04")
def test_04_mixes_switches_and_combines_adapters(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "04_many_adapters.ipynb", 4)
    found = summary(execute(notebook, tmp_path, NBPEFT_STEPS="4", NBPEFT_TEST_ORDERS="4"))
    assert found["mixed rows as alone"] == found["same answers after loading"] == "12 of 12"
    assert 0 <= float(found["largest difference of numbers"]) < 1e-3
    assert found["adapters"] == "orders, filters, dates, both"
    assert {name for name in found if name.startswith("score ties")} == {"score ties, orders", "score ties, dates"}
    for task in ("orders", "filters", "dates"):
        assert (tmp_path / "adapters" / "tasks" / task / "adapter_model.safetensors").is_file()


@pytest.mark.xdist_group("notebook 05")
def test_05_swaps_without_compiling_again(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "05_hot_swapping.ipynb", 4)
    found = summary(execute(notebook, tmp_path, NBPEFT_STEPS="4", NBPEFT_TEST_ORDERS="4"))
    assert found["swaps"] == "12"
    assert found["same score as when loaded"] == "12 of 12"
    assert 0 <= float(found["largest difference of numbers"]) < 1e-2
    assert found["bad adapters refused"] == "2 of 2"
    assert found["bit for bit as before"] == "True"
    if found["compiled"] == "yes":
        assert found["recompilations"] == "0"
        assert int(found["recompilations then"]) > 0, "the counter counts nothing"


@pytest.mark.xdist_group("notebook 02, training")
def test_02_learns_on_a_base_in_4_bits(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "02_qlora_training.ipynb", 4)
    last = next(i for i, cell in enumerate(notebook.cells) if "score" in cell.metadata.get("tags", ()))
    notebook.cells = notebook.cells[: last + 1]
    base, adapter = re.findall(r"4-bit base with.*: ([\d.]+)% right of 64", printed(execute(notebook, tmp_path)))
    assert float(base) < 20 and float(adapter) >= 80


@pytest.mark.xdist_group("notebook 02, shortened")
def test_02_forecasts_saves_reloads_and_merges(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "02_qlora_training.ipynb", 4)
    found = summary(execute(notebook, tmp_path, NBPEFT_STEPS="2", NBPEFT_TEST_ORDERS="4"))
    assert 0.25 < float(found["quantized layers"].split()[0]) <= 0.27
    assert abs(percent(found["error of the forecast"])) < 6
    copied, rounded = (
        float(found[f"merge error in {where}"].split()[0].replace(",", "")) for where in ("the copy", "4 bits")
    )
    assert 0 < copied < rounded
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


def test_02_ships_the_results_of_a_full_run() -> None:
    found = summary(nbformat.read(NOTEBOOKS / "02_qlora_training.ipynb", 4))
    assert found["test orders"] == "64" and percent(found["score base in 4 bits"]) < 20
    ways = ("adapter", "adapter on a fresh 4-bit base", "adapter on the full-precision base", "merged into a copy")
    assert all(percent(found[f"score {way}"]) >= 80 for way in ways)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_notebooks_hold_results_and_no_widget_state(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / name, 4)
    assert "widgets" not in notebook.metadata
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert outputs, "run it and keep the outputs: readers see them before they run anything"
    assert not any(output.output_type == "error" for output in outputs)
    text = nbformat.writes(notebook)
    assert not re.search(r"/(root|work|tmp|home)/", text)
