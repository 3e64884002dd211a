"""The quickstart twice in one kernel."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, printed, shortened

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

MEASURE = """
import gc as _gc
_gc.collect()
import torch as _torch
print("live", sum(_t.untyped_storage().nbytes() for _t in {
    _t.untyped_storage().data_ptr(): _t for _t in _gc.get_objects() if issubclass(type(_t), _torch.Tensor)
}.values()))
"""


def test_01_twice_in_one_kernel_keeps_no_memory(tmp_path: Path) -> None:
    notebook = shortened(nbformat.read(NOTEBOOKS / "01_lora_finetuning.ipynb", 4), steps=2, rows=4)
    once = [cell for cell in notebook.cells if cell.cell_type == "code"]
    measure = nbformat.v4.new_code_cell(MEASURE)
    notebook.cells = [*once, measure, *[cell.copy() for cell in once], measure.copy()]
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
    execute(notebook, tmp_path)
    first, second = (int(value) for value in re.findall(r"^live (\d+)$", printed(notebook), re.MULTILINE))
    assert second <= first * 1.02 + 1e6
