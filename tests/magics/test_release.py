"""After ``%lora unload`` no output, traceback or panel keeps adapter tensors alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch

from tests.magics.notebook import Notebook


def adapter_tensors(model: Any) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(p) for name, p in model.named_parameters() if ".lora_" in name]


def alive(references: list[weakref.ref[torch.Tensor]]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def after_unload(notebook: Notebook, *cells: str, before: Callable[[Any], None] = lambda model: None) -> int:
    """Adapter tensors that live after some cells and then ``%lora unload``."""
    references = adapter_tensors(notebook["model"])
    assert len(references) == alive(references) == 12
    before(notebook["model"])
    for cell in cells:
        notebook.run(cell)
    notebook.do("%lora unload")
    return alive(references)


def test_results_in_out(adapted: Notebook) -> None:
    assert after_unload(adapted, "%lora", "%lora use chat", "%lora panel", "%lora memory", "%lora use sql") == 0
    assert len(adapted["Out"]) >= 5


def test_the_model_itself_in_out(adapted: Notebook) -> None:
    assert after_unload(adapted, "model", "_", "1 + 1") == 0


def test_a_mistake_before(adapted: Notebook) -> None:
    assert after_unload(adapted, "%lora use nope", "%%lora model\ntarget_modules = ['nope']") == 0


def test_an_error_with_a_traceback_before(adapted: Notebook) -> None:
    cell = (
        "def fail(inner):\n    weight = [p for n, p in inner.named_parameters()]\n    raise KeyError('x')\nfail(model)"
    )
    assert after_unload(adapted, cell) == 0


def test_results_never_hold_a_model(notebook: Notebook) -> None:
    notebook.do("result = %lora add model target_modules=q_proj")
    assert notebook["result"].reference._model is None
    assert notebook["result"].model is notebook["model"]
    reference = weakref.ref(notebook["model"])
    del notebook.shell.user_ns["model"]
    gc.collect()
    assert reference() is None
    assert notebook.session.state.models == ()


def test_reconfiguring_frees_the_old_tensors(adapted: Notebook) -> None:
    references = [weakref.ref(p) for name, p in adapted["model"].named_parameters() if ".sql." in name]
    adapted.do("%%lora model --name sql\nr = 3\ntarget_modules = ['q_proj']")
    assert alive(references) == 0
