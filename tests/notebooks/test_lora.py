"""The quickstart, and using what it saved."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, count, execute, percent, shortened, summary

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder, so that notebook 03 finds what notebook 01 saved."""
    return tmp_path_factory.mktemp("notebooks")


def test_01_teaches_what_no_prompt_can(shared: Path) -> None:
    notebook = shortened("01_lora_finetuning.ipynb", TEST_ORDERS=16)
    found = summary(execute(notebook, shared))
    assert max(count(found[f"score {name}"]) for name in ("base model", "three examples", "ten examples")) <= 1
    adapter = count(found["score adapter"])
    assert adapter >= 14
    assert adapter == count(found["score loaded"]) == count(found["score merged"])
    assert 1 < float(found["adapter on disk"].removesuffix(" MB")) < 30


def test_01_shows_adapter_and_base_side_by_side(tmp_path: Path) -> None:
    notebook = execute(shortened("01_lora_finetuning.ipynb", STEPS=2, TEST_ORDERS=2), tmp_path)
    commands = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith("%lora compare")]
    page = "".join(output.data.get("text/html", "") for output in commands[0].outputs)
    assert "base" in page and "codes" in page
    assert "--panel" in commands[-1].source and commands[-1] is [c for c in notebook.cells if c.cell_type == "code"][-1]


@pytest.mark.slice
def test_01_ships_the_results_of_a_full_run() -> None:
    notebook = nbformat.read(NOTEBOOKS / "01_lora_finetuning.ipynb", 4)
    found = summary(notebook)
    ways = ("base model", "three examples", "ten examples", "adapter", "loaded", "merged")
    scores = [count(found[f"score {way}"]) / int(found[f"score {way}"].split()[2].rstrip(",")) for way in ways]
    assert max(scores[:3]) < 0.4 and min(scores[3:]) > 0.9
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first = next(place for place, cell in enumerate(codes) if cell.source.startswith(("%lora", "%%lora")))
    assert sum(len(cell.source.splitlines()) for cell in codes[:first]) <= 20, "the first command comes early"


def test_03_answers_alike_with_the_adapter_merged_and_shipped(shared: Path) -> None:
    found = summary(execute(nbformat.read(NOTEBOOKS / "03_adapter_inference.ipynb", 4), shared))
    assert percent(found["score base"]) < 20
    assert percent(found["score adapter"]) >= 75
    same, total = map(int, found["same answers after merging"].split(" of "))
    assert same == total
    assert found["same answers after shipping"] == f"{total} of {total}"
