from __future__ import annotations

from nbpeft.training.monitor.stopwatch import Stopwatch
from tests.training.support import Clock


def test_pauses_do_not_count_and_a_stop_is_final() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    clock.advance(1.0)
    assert watch.elapsed == 0.0 and not watch.has_stopped
    watch.start()
    clock.advance(2.0)
    watch.pause()
    clock.advance(4.0)
    assert watch.elapsed == 2.0
    assert watch.resume() and not watch.resume()
    clock.advance(8.0)
    watch.stop()
    clock.advance(16.0)
    assert watch.elapsed == 10.0 and watch.has_stopped


def test_it_shows_the_time_of_another_process() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    watch.mirror(5.0, paused=False)
    clock.advance(1.0)
    assert watch.elapsed == 6.0
    watch.mirror(7.0, paused=True)
    clock.advance(1.0)
    assert watch.elapsed == 7.0
