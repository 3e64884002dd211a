"""Blocks of changes: what begins, what is counted, and what is released when a block cannot begin."""

from __future__ import annotations

import signal
import threading

import pytest

from nbpeft.engine.changes.active_state import ActiveState
from nbpeft.engine.changes.transaction import Transaction
from tests.waiting import PATIENCE


@pytest.fixture
def transaction() -> Transaction:
    return Transaction(ActiveState(), lambda: None)


def test_each_change_increases_the_revision(transaction: Transaction) -> None:
    for before in range(3):
        assert transaction.revision == before
        with transaction.block():
            pass
    with transaction.block(quiet=True):
        pass
    assert transaction.revision == 3


def test_an_interruption_comes_at_the_end_of_a_block_and_undoes_it(transaction: Transaction) -> None:
    reached, values = [], {"a": 1}
    with pytest.raises(KeyboardInterrupt), transaction.block() as change:
        change.keep(values)
        signal.raise_signal(signal.SIGINT)
        values["a"] = 2
        reached.append("the end")
    assert reached == ["the end"] and values == {"a": 1}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_block_that_cannot_begin_lets_others_begin(transaction: Transaction, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(transaction, "begin", fails)
        with pytest.raises(KeyboardInterrupt), transaction.block():
            pass
    found: list[str] = []

    def change() -> None:
        transaction.active_state.close(wait=False)  # BusyError while another thread has it closed
        transaction.active_state.open()
        found.append("free")

    thread = threading.Thread(target=change)
    thread.start()
    thread.join(PATIENCE)
    assert found == ["free"]
