from __future__ import annotations

import threading

import pytest

from nbpeft.training.monitor.control import RunControl
from tests.waiting import PATIENCE


def test_goes_on_until_stop_is_asked_for():
    control = RunControl()
    assert control.wait_or_stop() is False
    control.request_stop("enough")
    control.request_stop("second click")
    assert control.wait_or_stop() is True
    assert control.stop_requested and control.reason == "enough"


def test_pause_blocks_until_another_thread_resumes():
    control = RunControl()
    control.pause()
    waiting = threading.Event()
    passed = threading.Event()

    def loop():
        control.wait_or_stop(on_wait=waiting.set)
        passed.set()

    thread = threading.Thread(target=loop)
    thread.start()
    assert waiting.wait(PATIENCE)
    assert not passed.wait(0.15)
    control.resume()
    assert passed.wait(PATIENCE)
    thread.join(PATIENCE)


def test_stop_ends_a_pause():
    control = RunControl()
    control.pause()
    threading.Timer(0.05, control.request_stop).start()
    assert control.wait_or_stop() is True
    assert not control.paused


def test_asking_again_changes_nothing():
    control = RunControl()
    control.pause()
    control.pause()
    assert control.paused
    control.resume()
    control.resume()
    assert not control.paused


def test_poll_delivers_clicks_also_while_paused():
    control = RunControl()
    calls = []

    def poll():
        calls.append(control.paused)
        if len(calls) == 1:
            control.pause()
        if len(calls) == 4:
            control.resume()

    control.deliver_clicks = poll
    assert control.wait_or_stop() is False
    assert calls == [False, True, True, True]


def test_a_failing_poll_is_dropped_with_a_warning():
    control = RunControl()

    def poll():
        raise OSError("socket closed")

    control.deliver_clicks = poll
    with pytest.warns(UserWarning, match="buttons of this run"):
        assert control.wait_or_stop() is False
    assert control.deliver_clicks is None


def test_interrupt_in_poll_passes_through():
    control = RunControl()

    def poll():
        raise KeyboardInterrupt

    control.deliver_clicks = poll
    with pytest.raises(KeyboardInterrupt):
        control.wait_or_stop()


def test_saving_happens_between_steps_and_in_a_pause():
    control, reports, saved = RunControl(), [], []
    remove = control.on_request(lambda: reports.append(control.save_requested))
    control.request_save()
    control.request_save()
    assert reports == [True, True] and control.save_requested
    control.wait_or_stop(on_save=lambda: saved.append(control.waiting))
    control.pause()

    def save():
        saved.append(control.waiting)
        control.resume()

    control.wait_or_stop(on_save=save, on_wait=threading.Thread(target=control.request_save).start)
    assert saved == [False, True] and not control.save_requested and not control.waiting
    remove()
    count = len(reports)
    control.request_stop()
    assert len(reports) == count


def test_a_subscriber_that_fails_stops_no_request():
    def fails():
        raise ValueError("no")

    control, reports = RunControl(), []
    control.on_request(fails)
    control.on_request(lambda: reports.append(control.stop_requested))
    with pytest.warns(UserWarning, match="a subscriber failed: .*fails: ValueError: no"):
        control.request_stop()
    assert reports == [True]
