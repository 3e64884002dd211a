"""What ``--all`` runs on every stack: a notebook in a kernel of the stack, from a model to a file and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat

from tests.notebooks.support import execute, printed
from tests.wheels import ROOT

CELLS = (
    f"""%load_ext nbpeft
import sys
sys.path += [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
import nbpeft
from char_tokenizer import CharTokenizer
from tiny_models import llama
torch.set_num_threads(1)
model, tokenizer = llama(), CharTokenizer()
rows = [{{"prompt": "a:", "completion": " b"}}, {{"prompt": "c:", "completion": " d"}}]""",
    """%%lora model --name orders
r = 2
target_modules = "all-linear"
task_type = "CAUSAL_LM\"""",
    """%%lora_train model --data rows --tokenizer tokenizer
max_steps = 3
learning_rate = 1e-2
logging_steps = 1
report_to = []""",
    "%lora score --data rows --metric loss --tokenizer tokenizer",
    "%lora save saved --adapter orders",
    """tokens = torch.arange(1, 9)[None]
again = nbpeft.PeftModel.from_pretrained(llama(), "saved")
with torch.no_grad():
    trained, loaded = model(tokens).logits, again(tokens).logits
    with again.disable_adapter():
        base = again(tokens).logits
print("loaded:", torch.equal(trained, loaded), "- changed:", not torch.equal(trained, base))""",
    "%lora panel --model model",
)


def outputs_of(notebook: Any, index: int) -> list[Any]:
    return [output.data for output in notebook.cells[index].outputs if "data" in output]


def test_a_notebook_from_a_model_to_a_file_and_back(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    execute(notebook, tmp_path)
    assert "loaded: True - changed: True" in printed(notebook)
    assert any("training orders finished: step 3/3" in data["text/plain"] for data in outputs_of(notebook, 2))
    assert any("loss" in data.get("text/plain", "") for data in outputs_of(notebook, 3))
    assert any("application/vnd.jupyter.widget-view+json" in data for data in outputs_of(notebook, 6))
