"""A PEFT script as it is, as cells, and killed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks.support import NOTEBOOKS, execute, printed, replaced, summary

NOTEBOOK = NOTEBOOKS / "09_coming_from_peft.ipynb"
COUNTER = "steps = itertools.count(1)\n"
AT_EACH_STEP = """\
from nbpeft.training.monitor import run_checkpointer

run_checkpointer.SHORTEST, run_checkpointer.SHARE = 0.0, 1e9
"""
"""In the script that is killed: its state is written at each step, so that nothing has to be waited for."""


@pytest.mark.slow
@pytest.mark.real_model
def test_09_runs_the_script_on_both_and_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    once = {"for library in libraries * 2:": "for library in libraries:", "for _ in range(6))": "for _ in range(1))"}
    once |= {"time.sleep(10)": "pass", COUNTER: COUNTER + AT_EACH_STEP}
    notebook = execute(replaced(nbformat.read(NOTEBOOK, 4), once), tmp_path, NBPEFT_STEPS="4")
    found = summary(notebook)
    assert_alike(found, steps=4)
    assert "crashed at step" in printed(notebook)
    files = {path.name for path in (tmp_path / "peft_script" / "with-nbpeft").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files


def test_09_ships_the_results_of_a_full_run() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    assert_alike(summary(notebook), steps=12)
    assert "crashed at step" in printed(notebook)


def assert_alike(found: dict[str, str], steps: int) -> None:
    """What does not depend on the machine: the numbers, the file, and what a failed command leaves."""
    assert found["equal losses of the script"] == f"{steps} of {steps}"
    assert found["same names in the file"] == "True"
    assert float(found["difference of the weights"]) < 0.1
    assert found["modules changed by a failed command, nbpeft"] == "0"
    assert found["last loss, never killed"] == found["last loss, killed and resumed"]
    assert 0 < int(found["resumed from step"]) <= steps // 2
