"""How far it is from what a person writes to where it acts: which functions of the package a debugger shows there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import nbpeft
from nbpeft.training import request
from nbpeft.training.data import open_data
from tests.magics.notebook import Notebook
from tests.tiny_models import llama, tokens

PACKAGE = Path(nbpeft.__file__).parent
MOST_FUNCTIONS, MOST_FILES = 18, 12


def walk(call: Callable[[], Any], end: str) -> list[tuple[str, str]]:
    """File and function of each frame of the package while a function of the name ``end`` runs first."""
    found: list[tuple[str, str]] = []

    def look(frame: FrameType | None, event: str, argument: Any) -> None:
        if event != "call" or found or frame is None or frame.f_code.co_qualname != end:
            return
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(PACKAGE):
                found.append((file.relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname))
            frame = frame.f_back

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found[::-1]


def check(found: list[tuple[str, str]]) -> None:
    assert found
    assert len(found) <= MOST_FUNCTIONS and len({file for file, _ in found}) <= MOST_FILES, found


def test_a_field_of_a_cell_to_the_tensor(notebook: Notebook) -> None:
    cell = "%%lora model --name a\nr = 16\ntarget_modules = ['q_proj']"
    found = walk(lambda: notebook.do(cell), "AdapterSite.new")
    assert found[0][1] == "NbpeftMagics.lora"
    check(found)


def test_a_token_to_the_product_of_a_layer() -> None:
    config = nbpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = nbpeft.get_peft_model(llama(), config).eval()
    with torch.no_grad():
        found = walk(lambda: model(input_ids=tokens()), "adapted_linear")
    assert found[0][1] == "PeftModel.forward"
    check(found)


def test_a_file_to_the_parameters(notebook: Notebook, tmp_path: Path) -> None:
    notebook.do("%%lora model --name a\nr = 4\ntarget_modules = ['q_proj']")
    notebook.do(f"%lora save {tmp_path}/a")
    found = walk(lambda: notebook.do(f"%lora load {tmp_path}/a --name b"), "LowRankAdapter.__init__")
    assert found[0][1] == "NbpeftMagics.lora"
    check(found)


def test_a_row_to_the_loss(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data are opened once, too."""
    notebook.do("%%lora model --name a\nr = 4\ntarget_modules = ['q_proj']")
    notebook["rows"] = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    opened: list[Any] = []

    def counted(data: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(data)
        return open_data(data, *args, **kwargs)

    monkeypatch.setattr(request, "open_data", counted)
    cell = "%%lora_train model --data rows\nmax_steps = 1\nreport_to = 'none'"
    found = walk(lambda: notebook.do(cell), "chunked_cross_entropy")
    assert found[0][1] == "NbpeftMagics.lora_train"
    check(found)
    assert len(opened) == 1
