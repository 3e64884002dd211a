"""The quickstart, and a second time in the same kernel."""

from __future__ import annotations

import copy
import re
from typing import Any

import nbformat
import pytest

from tests.notebooks.support import ADAPTED, NOTEBOOKS, best_prompted, execute, percent, printed, shortened, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "01_lora_finetuning.ipynb"

MEASURE = """
import gc as _gc
_gc.collect()
import torch as _torch
print("live", sum(_t.untyped_storage().nbytes() for _t in {
    _t.untyped_storage().data_ptr(): _t for _t in _gc.get_objects() if issubclass(type(_t), _torch.Tensor)
}.values()))
"""


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook with most of its work and then, in the same kernel, with next to none."""
    committed = nbformat.read(NOTEBOOK, 4)
    first, second = shortened(copy.deepcopy(committed), steps=70, rows=16), shortened(committed, steps=2, rows=4)
    cells = [[cell for cell in part.cells if cell.cell_type == "code"] for part in (first, second)]
    first.cells = [cell for part in cells for cell in (*part, nbformat.v4.new_code_cell(MEASURE))]
    for index, cell in enumerate(first.cells):
        cell["id"] = f"cell-{index}"
    return execute(first, tmp_path_factory.mktemp("notebook"))


def test_01_teaches_what_no_prompt_can(twice: Any) -> None:
    found = summary(twice)
    assert best_prompted(found) < 0.1
    symbols = {percent(found[f"symbols right {name}"]) for name in ADAPTED}
    assert len(symbols) == 1 and symbols.pop() > percent(found["symbols right ten examples"]) + 20
    assert 1 < float(found["adapter on disk"].removesuffix(" MB")) < 30


def test_01_ends_with_both_answers_side_by_side(twice: Any) -> None:
    *_, answers, panel, _ = twice.cells[: len(twice.cells) // 2]
    assert panel.source.startswith("%lora compare") and panel.source.endswith("--panel")
    page = "".join(output.data.get("text/html", "") for output in answers.outputs)
    assert "base" in page and "sounds" in page


def test_01_twice_in_one_kernel_keeps_no_memory(twice: Any) -> None:
    first, second = (int(value) for value in re.findall(r"^live (\d+)$", printed(twice), re.MULTILINE))
    assert second <= first * 1.02 + 1e6
