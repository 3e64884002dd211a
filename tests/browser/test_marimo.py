"""A marimo notebook without a front end: cards and panels are HTML, and a training's card is what its cell shows."""

from __future__ import annotations

import html
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.browser.kernels import ROOT, Generation, python_of

pytestmark = pytest.mark.slow

MARIMO = Generation("marimo", ("marimo>=0.25,<1",))
NOTEBOOK = """\
import marimo

app = marimo.App()


@app.cell
def _():
    import sys
    sys.path += {folders!r}
    import nbpeft
    from nbpeft.widgets import AdaptersPanel, show_runs
    from char_tokenizer import CharTokenizer
    from tiny_models import llama
    session = nbpeft.get_session()
    end = show_runs(session)
    rows = [{{"prompt": "a:", "completion": " b"}}, {{"prompt": "c:", "completion": " d"}}]
    return AdaptersPanel, CharTokenizer, llama, rows, session


@app.cell
def _(llama, session):
    model = llama()
    session.add(model, dict(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), name="orders")
    return (model,)


@app.cell
def _(CharTokenizer, model, rows, session):
    result = session.train(model, rows, tokenizer=CharTokenizer(), max_steps=2, report_to=[])
    return (result,)


@app.cell
def _(AdaptersPanel, result, session):
    AdaptersPanel(session if result else None)
    return


if __name__ == "__main__":
    app.run()
"""


def test_the_cells_of_a_notebook(tmp_path: Path) -> None:
    python = python_of(MARIMO)
    folders = [str(ROOT), str(ROOT / "tests"), sysconfig.get_path("purelib")]
    (tmp_path / "notebook.py").write_text(NOTEBOOK.format(folders=folders), encoding="utf-8")
    command = [str(python), "-m", "marimo", "-q", "export", "html", "notebook.py", "-o", "page.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "orders: added" in page
    assert "Training orders" in page and "finished" in page
    assert "not saved" in page and "%lora save" not in page, "there are no magics"
    assert "marimo does not show the buttons of this panel: call nbpeft.get_session().use" in page
    assert "widget-view" not in page
