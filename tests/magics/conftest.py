from __future__ import annotations

from typing import Any

import pytest

from tests.magics.notebook import Notebook


@pytest.fixture
def adapted(notebook: Notebook) -> Any:
    """A notebook whose model has the adapters ``sql`` (active) and ``chat``."""
    notebook.do("%lora add model --name chat r=2 target_modules=q_proj")
    notebook.do("%%lora model --name sql\nr = 4\ntarget_modules = ['q_proj', 'v_proj']")
    return notebook
