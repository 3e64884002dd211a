"""What is said about where this code runs."""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from nbpeft.session import Session
from nbpeft.widgets import environment
from nbpeft.widgets.panel import Panel


def _panels(base: type[Panel]) -> list[type[Panel]]:
    """All panels that can be shown."""
    own = [base] if hasattr(base, "kind") else []
    return own + [panel for derived in base.__subclasses__() for panel in _panels(derived)]


def test_the_command_that_installs_widgets_is_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_ipywidgets", lambda: False)
    monkeypatch.setattr(sys, "executable", "/my python; rm/bin/python")
    command = environment.widgets_hint().partition(": ")[2]
    assert shlex.split(command) == [sys.executable, "-m", "pip", "install", "ipywidgets"]


def test_marimo_gets_html_without_buttons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.shown_as() == "text"
    monkeypatch.setitem(sys.modules, "marimo", SimpleNamespace(running_in_notebook=lambda: True))
    assert environment.shown_as() == environment.shown_as("widgets") == "html"
    assert environment.shown_as("text") == "text"
    monkeypatch.setattr(environment, "has_ipywidgets", lambda: False)
    assert environment.widgets_hint() == "", "installing them would not help"
    monkeypatch.setitem(sys.modules, "marimo", SimpleNamespace(running_in_notebook=lambda: False))
    assert environment.shown_as() == "text", "imported in a script"
    monkeypatch.setitem(sys.modules, "marimo", SimpleNamespace())
    assert environment.shown_as() == "text", "another module of that name"


@pytest.mark.parametrize("panel", _panels(Panel), ids=lambda panel: panel.kind)
def test_where_there_are_no_buttons_a_panel_names_a_method_of_the_session(panel: type[Panel]) -> None:
    assert callable(getattr(Session, panel.session_method))


class _Kernel:
    """As much of a kernel as sends again: its events and its loop, whose calls are collected."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []
        self.shell = SimpleNamespace(events=SimpleNamespace(register=self._keep, unregister=self._keep))
        self.io_loop = SimpleNamespace(call_later=None, add_callback=lambda _, seconds, call: self.calls.append(call))

    def _keep(self, event: str, call: Callable[[], object]) -> None:
        assert event == "post_run_cell"
        self.cell_ended = call


class _View:
    """A view whose first message is sent while another thread draws it again."""

    def __init__(self, resender: environment.Resender) -> None:
        self.resender, self.drawn, self.sent = resender, 0, [0]

    def draw(self) -> None:
        self.drawn += 1
        thread = threading.Thread(target=self.resender.drawn, args=(self,))
        thread.start()
        thread.join()

    def resend(self) -> None:
        self.sent.append(self.drawn)
        if self.drawn == 1:
            self.draw()


def test_what_is_drawn_while_a_cell_ends_is_sent_too(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel()
    monkeypatch.setattr(environment, "running_kernel", lambda: kernel)
    monkeypatch.setattr(environment, "drops_threads", lambda: True)
    resender = environment.Resender()
    view = _View(resender)
    view.draw()
    kernel.cell_ended()
    assert view.sent == [0, 1]
    for call in kernel.calls:
        call()
    assert view.sent[-1] == view.drawn == 2
    kernel.cell_ended()
    sent = len(view.sent)
    kernel.cell_ended()
    assert len(view.sent) == sent
    resender.close()
