"""The thread behind a panel: one job at a time, the newest."""

from __future__ import annotations

import threading
from typing import Any

from nbpeft.widgets.worker import Worker


def test_the_worker_does_the_newest_job() -> None:
    worker, done, started, go = Worker(), [], threading.Event(), threading.Event()

    def first(stopped: Any) -> None:
        started.set()
        go.wait(10)
        done.append(("first", stopped()))

    worker.submit(first)
    assert started.wait(10)
    worker.submit(lambda stopped: done.append(("second", stopped())))
    worker.submit(lambda stopped: done.append(("third", stopped())))
    assert worker.waiting
    go.set()
    assert worker.wait(10)
    assert done == [("first", True), ("third", False)]
    worker.submit(lambda stopped: done.append(("late", stopped())), delay=30)
    worker.stop()
    assert worker.wait(5)
    assert len(done) == 2
