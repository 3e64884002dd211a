"""Learned prompts in cells: made, re-executed with another length, and in the table of adapters."""

from __future__ import annotations

from typing import Any

from tests.magics.notebook import Notebook
from tests.tiny_models import tokens


def test_a_cell_makes_a_prompt_and_makes_it_anew(notebook: Notebook) -> None:
    cell = "%%lora model --method prompt_tuning --name soft\nnum_virtual_tokens = {}\ntask_type = 'CAUSAL_LM'"
    first = notebook.do(cell.format(4))
    assert first.adapter.summary == {"tokens": "4"} and first.adapter.parameter_count == 4 * 32
    model: Any = notebook["model"]
    assert model(input_ids=tokens()).logits.shape[1] == 13
    again = notebook.do(cell.format(6))
    assert again.adapter.parameter_count == 6 * 32 and model(input_ids=tokens()).logits.shape[1] == 15
    assert "prompt tuning" in str(notebook.do("%lora")) and "tokens=6" in str(notebook.do("%lora"))
    line = notebook.run("%%lora model --method prefix_tuning --name k").line
    assert "num_virtual_tokens must be a whole number of at least 1, such as 20" in line
    line = notebook.run("%%lora model --method p_tuning --name k\nnum_virtual_token = 3").line
    assert "did you mean 'num_virtual_tokens'" in line.lower()
