"""Colab's IPython, ipykernel and ipywidgets run the cells of a notebook: adapt, train, show, switch, save.

The kernel is that of the matrix; torch and transformers come from this environment, behind its packages.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.kernels import COLAB_TODAY, ROOT, interpreter_of, running_kernel
from tests.browser.test_kernel_matrix import VERSIONS, Notebook

pytestmark = pytest.mark.slow

SET_UP = """\
import sys
sys.path += {folders!r}
from char_tokenizer import CharTokenizer
from tiny_models import llama
model, tokenizer = llama(), CharTokenizer()
rows = [{{"prompt": "a:", "completion": " b"}}, {{"prompt": "c:", "completion": " d"}}]
"""
TRAIN = """\
%%lora_train model --data rows --tokenizer tokenizer
max_steps = 2
learning_rate = 1e-2
report_to = []
"""


@pytest.fixture(scope="module")
def colab() -> Iterator[Notebook]:
    with running_kernel(interpreter_of(COLAB_TODAY)) as client:
        notebook = Notebook(client)
        notebook.wait_for_end(notebook.start("pass"))
        yield notebook


def test_the_cells_of_a_notebook(colab: Notebook, tmp_path: Path) -> None:
    def run(code: str) -> str:
        request = colab.start(code)
        colab.wait(lambda: request in colab._idle, seconds=240)
        return colab.text

    run("%load_ext nbpeft")
    assert "VERSIONS 6.17.1 7.34.0 7.7.1 False" in run(VERSIONS), "the extension imports no torch"
    run(SET_UP.format(folders=[sysconfig.get_path("purelib"), str(ROOT / "tests")]))
    run("%%lora model --name orders\nr = 2\ntarget_modules = ['q_proj']\ntask_type = 'CAUSAL_LM'")
    run(TRAIN)
    run("%lora panel")
    run("%lora use base\n%lora use orders")
    run(f"%lora save {tmp_path} --adapter orders")
    run("import nbpeft.examples as examples\nexamples.Scores('t', {'base model': 0.0, 'adapter': 1.0})")
    said = run("print('TRAINED', model.active_adapters, float(model.manager.parameters('orders')[1].abs().sum()) > 0)")
    assert "TRAINED ['orders'] True" in said
    assert (tmp_path / "adapter_model.safetensors").is_file()
    shown = [m["content"]["data"] for m in colab.messages if "data" in m["content"]]
    html = "".join(data.get("text/html", "") for data in shown if isinstance(data, dict))
    assert "orders" in html and "Training orders" in html and "data:image/svg+xml" in html
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown), "the panel is a widget"
