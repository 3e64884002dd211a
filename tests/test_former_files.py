"""Files that nbpeft 0.2.0 wrote: adapters in each format, runs, and a notebook with its outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nbpeft.model import PeftModel, get_peft_model_state_dict
from nbpeft.runs.store import RunStore
from tests.closeness import assert_close, differ
from tests.magics.notebook import Notebook
from tests.runs.killed import session_in
from tests.tiny_models import llama, logits

FORMER = Path(__file__).parent / "former"
ADAPTERS = FORMER / "adapters-0.2"
VIEW = "application/vnd.jupyter.widget-view+json"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)


class UNet2DConditionModel(nn.Module):
    """A part of a pipeline for images, with one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn1.to_q(x)


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "prompt", "bin"])
def test_adapter_folders_load_with_the_tensors_they_have(name: str) -> None:
    model = PeftModel.from_pretrained(llama(), ADAPTERS / name).eval()
    file = ADAPTERS / name / "adapter_model.safetensors"
    saved = load_file(file) if file.exists() else torch.load(file.with_suffix(".bin"), weights_only=True)
    loaded = get_peft_model_state_dict(model)
    assert saved and saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
    fields = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    config = model.peft_config["default"].to_dict()
    assert all(config[key] == fields[key] for key in ("peft_type", "r", "lora_alpha", "use_dora") if key in fields)
    assert differ(logits(model)[:, -1], logits(llama())[:, -1])


@pytest.mark.parametrize("file", ["kohya/default.safetensors", "diffusers/pytorch_lora_weights.safetensors"])
def test_lora_files_of_image_models_load(file: str) -> None:
    model = PeftModel.from_pretrained(UNet2DConditionModel(), ADAPTERS / file)
    (adapter,) = (layer.adapter("default") for layer in model.manager.layers.values())
    change = adapter.delta_weight(torch.zeros(4, 4), model.manager.layers["attn1.to_q"].base)
    saved = load_file(ADAPTERS / file)
    down = next(tensor for key, tensor in saved.items() if "down" in key or "lora_A" in key)
    up = next(tensor for key, tensor in saved.items() if "up" in key or "lora_B" in key)
    alpha = next((float(tensor) for key, tensor in saved.items() if key.endswith("alpha")), 2.0)
    assert_close(change, up @ down * alpha / 2)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A copy of the folder of runs: sql-1, which ended, and orders-1, which was interrupted after 2 of 5 steps."""
    return Path(shutil.copytree(FORMER / "runs-0.2", tmp_path / "runs"))


def test_runs_are_listed_and_their_adapters_load(runs: Path) -> None:
    ended = {record.name: (record.status, record.step, record.total_steps) for record in RunStore(runs).records()}
    assert ended == {"sql-1": ("finished", 4, 4), "orders-1": ("stopped", 2, 5)}
    listed = str(session_in(runs).runs("sql-1", "orders-1"))
    assert "sql-1" in listed and "lora_alpha" in listed
    model = PeftModel.from_pretrained(llama(), runs / "sql-1" / "checkpoint-4" / "sql", "sql")
    assert list(model.peft_config) == ["sql"]


def test_a_notebook_runs_again_and_its_saved_panel_needs_nothing_of_nbpeft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = json.loads((FORMER / "notebook-0.2.json").read_text())
    notebook = Notebook()
    try:
        for cell in saved["cells"]:
            assert all(output["output_type"] != "error" for output in cell["outputs"])
            notebook.do("".join(cell["source"]))
        assert list(notebook["model"].peft_config) == ["orders"] and (tmp_path / "adapters").is_dir()
    finally:
        notebook.close()
    states: dict[str, Any] = saved["metadata"]["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    outputs = [output.get("data", {}) for cell in saved["cells"] for output in cell["outputs"]]
    shown = {data[VIEW]["model_id"] for data in outputs if VIEW in data}
    assert shown and shown <= states.keys()
    assert {state["model_module"] for state in states.values()} <= {
        f"@jupyter-widgets/{kind}" for kind in ("base", "controls")
    }
