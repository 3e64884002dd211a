"""The notebooks as they are committed."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest

from tests.notebooks.support import (
    ADAPTED,
    GALLERY,
    NOTEBOOKS,
    PARAMETERS,
    TASKS,
    best_prompted,
    number,
    percent,
    share,
    summary,
)

NAMES = [path.relative_to(NOTEBOOKS).as_posix() for folder in (NOTEBOOKS, GALLERY) for path in folder.glob("*.ipynb")]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_shipped_notebooks_hold_results_and_no_widget_state(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / name, 4)
    assert "widgets" not in notebook.metadata
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert outputs, "run it and keep the outputs: readers see them before they run anything"
    assert not any(output.output_type == "error" for output in outputs)
    text = nbformat.writes(notebook)
    assert not re.search(r"/(root|work|tmp|home)/", text)


def test_the_index_has_all_notebooks_the_gallery_first_and_the_appendix_last() -> None:
    page = (NOTEBOOKS / "guide" / "index.md").read_text(encoding="utf-8").partition("## Notebooks\n")[2]
    listed = re.findall(r"^\| \[\w+\]\(\.\./([\w/]+\.ipynb)\)", page, re.M)
    appendix = "06_hot_swapping.ipynb"
    assert sorted(listed) == sorted(NAMES) and listed[-1] == appendix
    gallery = sum(name.startswith("gallery/") for name in NAMES)
    assert all(name.startswith("gallery/") for name in listed[:gallery])
    assert committed(appendix).cells[0].source.startswith("# Appendix:")


def committed(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / name, 4)


def test_01_ships_the_results_of_a_full_run() -> None:
    notebook = committed("01_lora_finetuning.ipynb")
    found = summary(notebook)
    assert best_prompted(found) < 0.1
    assert min(share(found[f"score {name}"]) for name in ADAPTED) > 0.15
    symbols = {name: percent(found[f"symbols right {name}"]) for name in ("ten examples", *ADAPTED)}
    assert min(symbols[name] for name in ADAPTED) > symbols["ten examples"] + 30
    codes = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    first = next(place for place, source in enumerate(codes) if source.startswith(("%lora", "%%lora")))
    assert sum(len(source.splitlines()) for source in codes[:first]) <= 20, "the first command comes early"


def test_03_ships_the_results_of_a_full_run() -> None:
    notebook = committed("03_qlora_training.ipynb")
    found = summary(notebook)
    assert found["trained"].endswith(" s for 70 steps")
    assert all(value.endswith(" of 48") for name, value in found.items() if name.startswith("score "))
    assert share(found["score 4-bit base"]) < 0.2
    for way in ("4-bit base + adapter", "merged into a copy", "4 bits, calibrated"):
        assert share(found[f"score {way}"]) >= 0.9
    assert share(found["score full precision + adapter"]) >= 0.6
    assert share(found["score merged into 4 bits"]) < 0.2
    plans = [
        output.data["text/plain"]
        for cell in notebook.cells
        if "--device T4" in cell.source and cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert "does not fit" in plans[0] and "fits" in plans[1] and "does not fit" not in plans[1]


def test_04_ships_the_results_of_a_full_run() -> None:
    found = summary(committed("04_adapter_inference.ipynb"))
    assert share(found["score base model"]) < 0.2
    assert share(found["score adapter"]) >= 0.9
    assert found["score merged"] == found["score adapter"]
    assert found["same answers merged"] == "48 of 48"
    speed = {name: float(found[f"speed {name}"].split()[0]) for name in ("with adapter", "merged")}
    assert speed["with adapter"] < speed["merged"]


def test_05_ships_the_results_of_a_full_run() -> None:
    found = summary(committed("05_many_adapters.ipynb"))
    for task in TASKS:
        alone = percent(found[f"score {task}, {task}"])
        assert alone > 60 and alone > percent(found[f"score base model, {task}"]) + 30
        assert abs(percent(found[f"score mixed batch, {task}"]) - alone) < 10


def test_07_uses_public_names_and_ships_a_full_run() -> None:
    notebook = committed("07_your_own_method.ipynb")
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "nbpeft.engine" not in source and "nbpeft.session" not in source
    found = summary(notebook)
    assert found["score MoRA"] == found["score MoRA loaded"] == found["score MoRA merged"]
    assert share(found["score LoRA"]) > 0 and share(found["score MoRA"]) > 0


def test_08_ships_the_results_of_a_full_run() -> None:
    found = summary(committed("08_several_processes.ipynb"))
    base, notebook, processes = (percent(found[f"score {name}"]) for name in ("base", "dates", "two_processes"))
    assert notebook > base + 20 and processes > base + 20
    assert float(found["largest difference of a loss"]) < 1e-3
    different, count = map(int, found["answers right in one of the two only"].split(" of "))
    assert count == 64 and different < 0.1 * count


def test_10_ships_the_results_of_a_full_run() -> None:
    found = summary(committed("10_choosing_a_method.ipynb"))
    for title in PARAMETERS:
        assert percent(found[f"symbols right {title}"]) > 60 and share(found[f"words right {title}"]) > 0.1, title
    assert percent(found["symbols right OFT as LoRA"]) > 50  # rank 64 loses a part of a rotation
    memory = {title: number(found[f"memory {title}"]) for title in PARAMETERS}
    assert min(memory, key=memory.__getitem__) == "MiSS" and max(memory, key=memory.__getitem__) == "VeRA"


def test_11_ships_the_results_of_a_full_run() -> None:
    found = summary(committed("11_preferences.ipynb"))
    assert share(found["repeats, base"]) < 0.1 and share(found["says_no_day, replies"]) < 0.7
    assert min(share(found[f"repeats, {name}"]) for name in ("preferred", "chosen_only")) > 0.9
    assert share(found["says_no_day, preferred"]) > 0.9
    assert share(found["says_no_day, chosen_only"]) > share(found["says_no_day, replies"])
    assert int(found["pairs"]) > 20


def test_12_ships_the_results_of_a_full_run() -> None:
    found = summary(committed("12_rewards.ipynb"))
    for way in ("sampled", "greedy"):
        base, adapter = (percent(found[f"is_brief, {way}, {name}"].split(" (")[0]) for name in ("base", "capitals"))
        assert adapter > 90 and adapter > base + 20
        base, adapter = (percent(found[f"is_right, {way}, {name}"].split(" (")[0]) for name in ("base", "capitals"))
        assert adapter > base
