"""The card of a training in the background where messages of other threads are dropped, as Colab does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.kernels import COLAB_TODAY, ROOT, Interpreter, interpreter_of, running_kernel
from tests.browser.test_kernel_matrix import Notebook

pytestmark = pytest.mark.slow

SET_UP = """\
import sys, threading, types
from fakes import FakeRun, FakeSession
from nbpeft.widgets import AdaptersPanel, close_all, show_run

sys.modules["google.colab"] = types.ModuleType("google.colab")
shell, messages = get_ipython(), get_ipython().kernel.session
send, dropped, running, needs_cell = messages.send, [], [True], [False]
SHOWN = ("comm_open", "comm_msg", "comm_close", "display_data", "update_display_data")

def send_of_main(stream, message, content=None, *arguments, **options):
    kind = message if isinstance(message, str) else message["header"]["msg_type"]
    if kind == "status":
        running[0] = content["execution_state"] == "busy"
    other = threading.current_thread() is not threading.main_thread() or (needs_cell[0] and not running[0])
    if kind in SHOWN and other:
        dropped.append(kind)
        return None
    return send(stream, message, content, *arguments, **options)

messages.send = send_of_main
session = FakeSession()
"""
TRAIN = """\
go, run = threading.Event(), FakeRun(session)
run.thread = 0  # not that of this cell
view = show_run(run, session, "model", ui={ui!r})
{panel}

def train():
    with run:
        for step in range(25):
            run.step()
        session.publish()
        go.wait()

thread = threading.Thread(target=train)
thread.start()
"""


@pytest.fixture(scope="module", params=["here", "colab"])
def kernel(request: pytest.FixtureRequest) -> Iterator[Notebook]:
    """A kernel of this environment, and Colab's."""
    interpreter = Interpreter(Path(sys.executable), ROOT)
    if request.param == "colab":
        interpreter = interpreter_of(COLAB_TODAY)
    with running_kernel(interpreter) as client:
        notebook = Notebook(client)
        notebook.run(SET_UP)
        yield notebook


@pytest.fixture
def notebook(kernel: Notebook) -> Iterator[Notebook]:
    kernel.messages.clear()
    yield kernel
    kernel.run("needs_cell[0] = False; go.set(); thread.join(); close_all(); dropped.clear()")


def shown(notebook: Notebook) -> list[str]:
    """The cards that were sent as HTML."""
    bundles = [message["content"].get("data", {}) for message in notebook.messages]
    return [html for bundle in bundles if isinstance(bundle, dict) and (html := bundle.get("text/html"))]


def values(notebook: Notebook) -> list[str]:
    """The values that widgets were given."""
    states: list[Any] = [message["content"].get("data", {}).get("state", {}) for message in notebook.messages]
    return [str(state["value"]) for state in states if "value" in state]


def has(texts: list[str], words: str) -> bool:
    return any(words in text for text in texts)


@pytest.mark.parametrize("ui", ["widgets", "html"])
def test_the_card_follows_without_a_cell(notebook: Notebook, ui: str) -> None:
    cards = values if ui == "widgets" else shown
    notebook.run(TRAIN.format(ui=ui, panel=""))
    notebook.wait(lambda: has(cards(notebook), "25 / 40"), seconds=120)
    notebook.run("go.set(); thread.join()")
    notebook.wait(lambda: has(shown(notebook), "finished"), seconds=120)
    assert "True" in notebook.run("print(len(dropped) > 0)"), "the training thread has drawn"


@pytest.mark.parametrize("ui", ["widgets", "html"])
def test_the_next_cell_shows_it_where_only_cells_may_send(notebook: Notebook, ui: str) -> None:
    notebook.run("needs_cell[0] = True\n" + TRAIN.format(ui=ui, panel=""))
    notebook.wait_for_end(
        notebook.start("while view._drawn is None or view._drawn.step < 25: threading.Event().wait(0.05)")
    )
    assert "25 / 40" in "".join((values if ui == "widgets" else shown)(notebook))


def test_panels_follow_too(notebook: Notebook) -> None:
    notebook.run(TRAIN.format(ui="html", panel="AdaptersPanel(session, 'model', ui='widgets')._ipython_display_()"))
    notebook.messages.clear()
    notebook.run("threading.Thread(target=session.use, args=('pirate',), kwargs={'model': 'model'}).start()")
    notebook.wait(lambda: has(shown(notebook), "pirate"), seconds=120)
