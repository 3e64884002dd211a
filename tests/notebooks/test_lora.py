"""The quickstart."""

from __future__ import annotations

from typing import Any

import nbformat
import pytest

from tests.notebooks.support import ADAPTED, NOTEBOOKS, best_prompted, execute, share, shortened, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "01_lora_finetuning.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return execute(shortened(nbformat.read(NOTEBOOK, 4), steps=70, rows=16), tmp_path_factory.mktemp("notebook"))


def test_01_teaches_what_no_prompt_can(executed: Any) -> None:
    found = summary(executed)
    assert best_prompted(found) < 0.1
    scores = {share(found[f"score {name}"]) for name in ADAPTED}
    assert len(scores) == 1 and scores.pop() > 0.8
    assert 1 < float(found["adapter on disk"].removesuffix(" MB")) < 30


def test_01_ends_with_both_answers_side_by_side(executed: Any) -> None:
    codes = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert codes[-1].source.startswith("%lora compare") and codes[-1].source.endswith("--panel")
    page = "".join(output.data.get("text/html", "") for output in codes[-2].outputs)
    assert "base" in page and "codes" in page
