"""``%lora convert`` and ``%lora methods`` in a real shell."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.magics.notebook import Notebook
from tests.tiny_models import randomize


def test_convert_makes_a_lora(notebook: Notebook) -> None:
    notebook.do("%lora add model --method hra --name a r=2 target_modules=q_proj,v_proj")
    randomize(notebook["model"], "a")
    done = notebook.do("%lora convert a --r 2")
    assert "converted 'a' (HRA) to 'a_lora' on model: LoRA, rank 2, 4 layers, nothing of the change lost" in str(done)
    assert "LoRA, rank" in str(notebook.do("%lora convert a --r 0.6 --name b"))
    assert notebook["model"].manager.names == ("a", "a_lora", "b")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("convert a", "%lora convert needs --r, e.g. %lora convert orders --r 16"),
        ("convert a --r much", "expected a rank such as 16 or a share such as 0.9, not 'much'"),
        ("convert chat --r 2 --name sql", "has an adapter 'sql' already; choose another name, or replace it"),
        ("convert nobody --r 2", "'nobody'"),
    ],
)
def test_mistakes_are_one_line(adapted: Notebook, line: str, words: str) -> None:
    assert words in adapted.run(f"%lora {line}").line


def test_methods_lists_what_each_costs_on_the_model(notebook: Notebook) -> None:
    listed = str(notebook.do("%lora methods"))
    assert " methods on model, with their defaults" in listed and "the usual choice" in listed
    fields = str(notebook.do("%lora methods model target_modules=all-linear r=4"))
    assert "with target_modules=all-linear, r=4 where available" in fields
    assert "did you mean" in notebook.run("%lora methods modle").line.lower()
    notebook["other"] = notebook["model"]
    assert "Parameters" not in str(notebook.do("%lora methods"))


def test_a_cell_of_a_method_completes_the_fields_of_that_method_alone(notebook: Notebook) -> None:
    offered = notebook.complete("%%lora model --method oft\n")
    assert "oft_block_size = " in offered or "oft_block_size=" in offered or "oft_block_size" in offered
    assert not any(word.startswith(("lora_", "use_dora", "vera_")) for word in offered)
    assert not notebook.complete("%%lora model --method oft\nlora_a")
    assert any(word.startswith("vera_dropout") for word in notebook.complete("%%lora model --method vera\nvera_"))


@pytest.mark.slow
def test_a_network_beside_the_model_is_made_in_a_cell(adapted: Notebook) -> None:
    assert "ShadowPEFT" in str(adapted.do("%lora methods"))
    cell = "%%lora model --method shadow --name side{}\nr = 3\nshadow_num_hidden_layers = 2"
    assert "dry run: ShadowPEFT 'side' would adapt" in str(adapted.do(cell.format(" --dry-run")))
    assert "added 'side' on model: ShadowPEFT r=3" in str(adapted.do(cell.format("")))
    refused = adapted.run("%%lora model --method shadow --name other\ntarget_modules = ['q_proj']").line
    assert "'q_proj' names none of the blocks" in refused and "other" not in adapted["model"].manager.names
    adapted.do("%lora use side")
    assert "its changes of a block's input depend on the text" in adapted.run("%lora merge").line


@pytest.mark.slow
def test_a_mixture_of_saved_adapters_is_made_in_a_cell(adapted: Notebook, tmp_path: Path) -> None:
    for name in ("sql", "chat"):
        adapted.do(f"%lora save {tmp_path / name} --adapter {name}")
    adapted["saved"] = {name: str(tmp_path / name) for name in ("sql", "chat")}
    listed = str(adapted.do("%lora methods"))
    assert "adapters must map the name of each LoRA to its folder or hub id" in listed
    cell = "%%lora model --method xlora --name mix{}\nadapters = saved\nlayerwise_scalings = True"
    assert "dry run: X-LoRA 'mix' would adapt" in str(adapted.do(cell.format(" --dry-run")))
    assert "added 'mix' on model: X-LoRA adapters=2" in str(adapted.do(cell.format("")))
    refused = adapted.run("%%lora model --method xlora --name other\nadapters = {'sql': 'nowhere'}").line
    assert "nowhere" in refused and "other" not in adapted["model"].manager.names
    adapted.do("%lora use mix")
    assert "X-LoRA weights its adapters for each token" in adapted.run("%lora merge").line
    adapted.do("%lora delete mix")
    adapted.do("%lora undo")
    assert "mix" in adapted["model"].manager.names
