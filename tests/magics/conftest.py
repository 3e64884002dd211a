from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.magics.notebook import Notebook


@pytest.fixture
def bare() -> Iterator[Notebook]:
    """A notebook without a model."""
    notebook = Notebook()
    yield notebook
    notebook.close()


@pytest.fixture
def notebook(bare: Notebook) -> Notebook:
    """A notebook whose variable ``model`` holds a tiny Llama."""
    from tests.tiny_models import llama

    bare["model"] = llama()
    return bare


@pytest.fixture
def adapted(notebook: Notebook) -> Any:
    """A notebook whose model has the adapters ``sql`` (active) and ``chat``."""
    notebook.do("%lora add model --name chat r=2 target_modules=q_proj")
    notebook.do("%%lora model --name sql\nr = 4\ntarget_modules = ['q_proj', 'v_proj']")
    return notebook
