"""Memory that any thread may read while another runs a command."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from nbpeft.errors import AdapterError
from nbpeft.session import Session
from nbpeft.widgets import AdaptersPanel
from tests.waiting import PATIENCE


def parts(memory: Any) -> dict[str, int]:
    return {part.name: part.byte_count for part in memory.parts}


def test_another_thread_measures_while_a_command_holds_the_lock(session: Session, two_adapters: Any) -> None:
    read: list[Any] = []
    with session.context.command("training orders"):
        thread = threading.Thread(target=lambda: read.append(session.measure("model")))
        thread.start()
        thread.join(PATIENCE)
    assert parts(read[0])["adapters"] == sum(item.byte_count for item in session.state.models[0].adapters)


def test_measuring_tells_nobody(session: Session, two_adapters: Any) -> None:
    told: list[Any] = []
    session.subscribe(told.append)
    session.measure("model")
    assert told == [] and session.state.models[0].memory is None


def test_a_model_that_is_not_there_is_named(session: Session, two_adapters: Any) -> None:
    with pytest.raises(AdapterError, match="'nope'"):
        session.measure("nope")


def test_the_panel_follows_what_deleting_frees(session: Session, two_adapters: Any) -> None:
    panel = AdaptersPanel(session, "model", ui="widgets")
    assert panel.widget is not None

    def shown() -> int:
        panel._live._wake.set()
        while panel._live._thread is not None:
            panel._live._thread.join(0.01)
        return parts(panel._memory)["adapters"]

    before = shown()
    freed = next(item.byte_count for item in session.state.models[0].adapters if item.name == "pirate")
    session.delete("pirate")
    assert shown() == before - freed
    panel.close()
