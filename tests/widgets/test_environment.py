"""What is said about where this code runs."""

from __future__ import annotations

import shlex
import sys

import pytest

from nbpeft.widgets import environment


def test_the_command_that_installs_widgets_is_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_ipywidgets", lambda: False)
    monkeypatch.setattr(sys, "executable", "/my python; rm/bin/python")
    command = environment.widgets_hint().partition(": ")[2]
    assert shlex.split(command) == [sys.executable, "-m", "pip", "install", "ipywidgets"]
