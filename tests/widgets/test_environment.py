"""What is said about where this code runs."""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from nbpeft.widgets import environment


def test_the_command_that_installs_widgets_is_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_ipywidgets", lambda: False)
    monkeypatch.setattr(sys, "executable", "/my python; rm/bin/python")
    command = environment.widgets_hint().partition(": ")[2]
    assert shlex.split(command) == [sys.executable, "-m", "pip", "install", "ipywidgets"]


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
