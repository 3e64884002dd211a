"""The quickstart."""

from __future__ import annotations

from typing import Any

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, share, shortened, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NOTEBOOK = NOTEBOOKS / "01_lora_finetuning.ipynb"
PROMPTED = ("base model", "three examples", "ten examples")
ADAPTED = ("adapter", "loaded", "merged")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return execute(shortened(nbformat.read(NOTEBOOK, 4), steps=70, rows=16), tmp_path_factory.mktemp("notebook"))


def test_01_teaches_what_no_prompt_can(executed: Any) -> None:
    found = summary(executed)
    assert max(share(found[f"score {name}"]) for name in PROMPTED) < 0.1
    scores = {share(found[f"score {name}"]) for name in ADAPTED}
    assert len(scores) == 1 and scores.pop() > 0.8
    assert 1 < float(found["adapter on disk"].removesuffix(" MB")) < 30


def test_01_ends_with_both_answers_side_by_side(executed: Any) -> None:
    codes = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert codes[-1].source.startswith("%lora compare") and codes[-1].source.endswith("--panel")
    page = "".join(output.data.get("text/html", "") for output in codes[-2].outputs)
    assert "base" in page and "codes" in page


@pytest.mark.slice
def test_01_ships_the_results_of_a_full_run() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    found = summary(notebook)
    assert max(share(found[f"score {name}"]) for name in PROMPTED) < 0.4
    assert min(share(found[f"score {name}"]) for name in ADAPTED) > 0.9
    codes = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    first = next(place for place, source in enumerate(codes) if source.startswith(("%lora", "%%lora")))
    assert sum(len(source.splitlines()) for source in codes[:first]) <= 20, "the first command comes early"
