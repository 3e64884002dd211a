"""Stop and Pause reach a running cell on every kernel, without a browser: clicks as raw messages."""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jupyter_client.blocking import BlockingKernelClient

from tests.browser.kernels import COLAB, STACKS, Stack, interpreter_of, running_kernel

pytestmark = pytest.mark.slow

SET_UP = """\
from fakes import FakeSession, simulate
from nbpeft.widgets import AdaptersPanel, show_run, training_panel
session = FakeSession()

def show(run, name):
    view = show_run(run, session, name)
    buttons = (view._buttons.stop, view._buttons.pause, view._buttons.resume)
    print('IDS', *(button.comm.comm_id for button in buttons), flush=True)

session.started.append(show)
"""
RUN = "run = simulate(session, steps={steps}, seconds={seconds}); print('ENDED', run.state.step, run.state.status)"
REMIND_AFTER = 0.5
"""Seconds after which a kernel that overlooks requests is reminded of them."""
VERSIONS = """\
import sys, ipykernel, IPython, ipywidgets
print('VERSIONS', ipykernel.__version__, IPython.__version__, ipywidgets.__version__, 'torch' in sys.modules)
"""


class Notebook:
    """Runs cells in a kernel and collects what they send.

    Args:
        client: A blocking client of the kernel.
        forgetful: The kernel overlooks a request now and then, until somebody connects to it.
    """

    def __init__(self, client: Any, *, forgetful: bool = False) -> None:
        self.client = client
        self.forgetful = forgetful
        self.text = ""
        self.messages: list[dict[str, Any]] = []
        self.errors: list[list[str]] | None = None
        self._idle: set[str] = set()

    def start(self, code: str) -> str:
        """Sends a cell; returns the request's id."""
        request: str = self.client.execute(code)
        return request

    def run(self, code: str) -> str:
        """Runs a cell; returns what it printed."""
        before = len(self.text)
        self.wait_for_end(self.start(code))
        return self.text[before:]

    def click(self, comm_id: str) -> None:
        """A click, as a front end sends it."""
        content = {"comm_id": comm_id, "data": {"method": "custom", "content": {"event": "click"}}}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def wait_for_end(self, request: str) -> None:
        self.wait(lambda: request in self._idle)

    def wait_for_text(self, pattern: str) -> re.Match[str]:
        self.wait(lambda: re.search(pattern, self.text))
        found = re.search(pattern, self.text)
        assert found
        return found

    def wait(self, condition: Callable[[], Any], seconds: float = 30) -> None:
        """Takes messages in until something is true."""
        deadline = time.monotonic() + seconds
        reminder = time.monotonic() + REMIND_AFTER
        while not condition():
            assert time.monotonic() < deadline, self.text
            if self.forgetful and time.monotonic() > reminder:
                self._remind()
                reminder = time.monotonic() + REMIND_AFTER
            try:
                self._take(self.client.get_iopub_msg(timeout=0.2))
            except queue.Empty:
                continue

    def wait_until_queued(self) -> None:
        """Gives the kernel time to read what was sent: what it reads after an error is not queued behind it."""
        for _ in range(3):
            time.sleep(0.4)
            if self.forgetful:
                self._remind()

    def _remind(self) -> None:
        """Makes the kernel look at its requests: a new connection does, a message on this one does not."""
        file = self.client.parent.connection_file
        other = BlockingKernelClient(connection_file=file)  # with an identity of its own, or it is not let in
        other.load_connection_file()
        other.start_channels(shell=True, iopub=False, stdin=False, hb=False, control=False)
        time.sleep(0.05)
        other.stop_channels()

    def cards(self) -> list[str]:
        """The cards of the run in its widget, as they were sent."""
        values = [
            message["content"]["data"].get("state", {}).get("value")
            for message in self.messages
            if message["msg_type"] in ("comm_open", "comm_msg")
        ]
        return [value for value in values if isinstance(value, str) and "Training orders" in value]

    def _take(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            self.text += content["text"]
        elif kind == "error":
            if self.errors is None:
                raise AssertionError("\n".join(content["traceback"]))
            self.errors.append(content["traceback"])
        elif kind == "status" and content["execution_state"] == "idle":
            self._idle.add(message["parent_header"].get("msg_id", ""))


SLICE = STACKS[-1]
"""The one of every run."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(stack, id=stack.name, marks=[pytest.mark.slice] * (stack is SLICE)) for stack in STACKS],
)
def stack(request: pytest.FixtureRequest) -> Stack:
    made: Stack = request.param
    return made


@pytest.fixture(scope="module")
def kernel(stack: Stack) -> Iterator[Notebook]:
    with running_kernel(interpreter_of(stack)) as client:
        notebook = Notebook(client, forgetful=stack.overlooks_requests)
        notebook.run(SET_UP)
        yield notebook


@pytest.fixture
def notebook(kernel: Notebook) -> Notebook:
    kernel.text = ""
    kernel.messages.clear()
    return kernel


def start_run(notebook: Notebook, steps: int = 3000, seconds: float = 0.02) -> tuple[str, str, str, str]:
    """Starts a run; returns its request and the comm ids of Stop, Pause and Resume."""
    notebook.text = ""
    request = notebook.start(RUN.format(steps=steps, seconds=seconds))
    found = notebook.wait_for_text(r"IDS (\S+) (\S+) (\S+)\n")
    time.sleep(0.3)
    return request, found[1], found[2], found[3]


def test_the_versions_are_those_asked_for_and_torch_is_not_needed(notebook: Notebook, stack: Stack) -> None:
    kernel, ipython, widgets, torch = notebook.run(VERSIONS).split()[1:]
    assert kernel == stack.ipykernel
    assert (stack.generation is COLAB) == ipython.startswith("7.") == widgets.startswith("7.")
    assert torch == "False"


def test_stop_ends_the_run_and_neither_the_next_cell_nor_the_next_run(notebook: Notebook) -> None:
    request, stop, *_ = start_run(notebook)
    following = notebook.start(RUN.format(steps=15, seconds=0.02))
    notebook.click(stop)
    notebook.click(stop)
    notebook.wait_for_end(request)
    assert re.search(r"ENDED \d+ stopped", notebook.text)
    notebook.wait_for_end(following)
    assert "ENDED 15 finished" in notebook.text
    notebook.run("pass")
    assert notebook.run("print('LIVE', len(training_panel._live))").split()[-1] == "0"
    assert "No such comm" not in notebook.text


def test_pause_waits_until_it_is_resumed(notebook: Notebook) -> None:
    request, stop, pause, resume = start_run(notebook)
    notebook.click(pause)
    notebook.click(pause)
    notebook.wait(lambda: any(">paused</span>" in card for card in notebook.cards()), seconds=5)
    count = len(notebook.cards())
    with pytest.raises(AssertionError):
        notebook.wait(lambda: len(notebook.cards()) > count, seconds=0.8)
    notebook.click(resume)
    notebook.wait(lambda: len(notebook.cards()) > count + 1, seconds=5)
    assert ">running</span>" in notebook.cards()[-1]
    notebook.click(pause)
    notebook.wait(lambda: ">paused</span>" in notebook.cards()[-1], seconds=5)
    notebook.click(stop)
    notebook.wait_for_end(request)
    assert re.search(r"ENDED \d+ stopped", notebook.text)


def test_an_interrupt_keeps_the_run_and_stops_queued_cells(notebook: Notebook, kernel: Notebook) -> None:
    request, *_ = start_run(notebook)
    following = notebook.start("print('QUEUED CELL RAN')")
    notebook.wait_until_queued()
    notebook.errors = []
    kernel.client.parent.interrupt_kernel()
    notebook.wait_for_end(request)
    notebook.wait_for_end(following)
    lines, notebook.errors = notebook.errors, None
    assert len(lines) == 1 and len(lines[0]) == 1 and re.fullmatch(r"stopped at step \d+", lines[0][0])
    assert "QUEUED CELL RAN" not in notebook.text
    assert ">stopped</span>" in notebook.cards()[-1]
    # Requests that come within a moment of the error are dropped, too.
    notebook.wait(lambda: notebook.run("print('GOES ON')").endswith("GOES ON\n"))


def test_a_click_shows_and_the_clock_moves_inside_a_step(notebook: Notebook) -> None:
    """Each step sleeps for five seconds in the main thread."""
    request, stop, pause, _ = start_run(notebook, steps=50, seconds=5)
    ticks = len(notebook.cards())
    notebook.click(pause)
    clicked = time.monotonic()
    notebook.wait(lambda: ">pausing after this step</span>" in notebook.cards()[-1], seconds=4)
    print(f"pause was shown after {time.monotonic() - clicked:.2f} s")
    notebook.wait(lambda: len(notebook.cards()) >= ticks + 3, seconds=2.5)
    assert not any(">paused</span>" in card for card in notebook.cards()[ticks:])
    notebook.wait(lambda: ">paused</span>" in notebook.cards()[-1], seconds=5)
    notebook.click(stop)
    notebook.wait_for_end(request)
    assert "ENDED 1 stopped" in notebook.text


def test_the_buttons_leave_no_widget(notebook: Notebook) -> None:
    count = (
        "import warnings\n"
        "import ipywidgets.widgets.widget as module\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "print('WIDGETS', len(getattr(module, '_instances', None) or module.Widget.widgets))"
    )
    # How the last runs ended stays for a page that is opened again, until the extension is unloaded.
    notebook.run("training_panel.close_views()")
    before = notebook.run(count)
    notebook.run(RUN.format(steps=3, seconds=0.02))
    notebook.run("training_panel.close_views()")
    assert notebook.run(count) == before


def test_the_panel_has_a_snapshot_and_clicks_reach_the_session(notebook: Notebook) -> None:
    notebook.run("panel = AdaptersPanel(session, 'model'); panel")
    shown = [
        message["content"]["data"]
        for message in notebook.messages
        if message["msg_type"] in ("execute_result", "display_data")
    ]
    kinds = [set(data) - {"text/plain"} for data in shown]
    assert kinds.count({"text/html"}) == 1, "the last state, which is saved"
    assert sum("application/vnd.jupyter.widget-view+json" in kind for kind in kinds) == 1 and len(kinds) == 2
    button = "panel._parts._choices._buttons[('use', 'sql')]"
    comm_id = notebook.run(f"print({button}.comm.comm_id)").strip()
    notebook.click(comm_id)
    notebook.wait(lambda: notebook.run("print('ACTIVE', *session.state.model('model').active)") == "ACTIVE sql\n")
    notebook.run("panel.close(); session.use('orders', model='model')")
