"""The thread behind a panel: one job at a time, the newest."""

from __future__ import annotations

import threading
from typing import Any

from nbpeft.widgets.worker import Worker
from tests.waiting import PATIENCE


def test_the_worker_does_the_newest_job() -> None:
    worker, done, started, go = Worker(), [], threading.Event(), threading.Event()

    def first(stopped: Any) -> None:
        started.set()
        go.wait(PATIENCE)
        done.append(("first", stopped()))

    worker.submit(first)
    assert started.wait(PATIENCE)
    worker.submit(lambda stopped: done.append(("second", stopped())))
    worker.submit(lambda stopped: done.append(("third", stopped())))
    assert worker.waiting
    go.set()
    assert worker.wait(PATIENCE)
    assert done == [("first", True), ("third", False)]
    worker.submit(lambda stopped: done.append(("late", stopped())), delay=30)
    worker.stop()
    assert worker.wait(PATIENCE)
    assert len(done) == 2
