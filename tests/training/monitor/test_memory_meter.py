from __future__ import annotations

import pytest

from nbpeft.state import MemoryState
from nbpeft.training.monitor.memory_meter import MemoryMeter
from tests.training.support import Clock


class Measure:
    """Counts its calls; each takes ``seconds``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
        self.count, self.now = 0, 0.0
        self.seconds = seconds
        monkeypatch.setattr("nbpeft.training.monitor.memory_meter.time.perf_counter", lambda: self.now)

    def __call__(self) -> MemoryState:
        self.count += 1
        self.now += self.seconds
        return MemoryState("cpu", (), None, None)


@pytest.mark.parametrize(
    ("seconds", "count"),
    [(0.0, 5), (0.03, 2)],  # at the start, then every 2 seconds; or every 3, a hundred times what a measurement takes
)
def test_memory_is_measured_at_each_interval_or_so_rarely_that_it_costs_a_hundredth(
    monkeypatch: pytest.MonkeyPatch, seconds: float, count: int
) -> None:
    clock, measure = Clock(), Measure(monkeypatch, seconds)
    meter = MemoryMeter(measure, clock, interval=1.0)
    for step in range(10):
        assert meter.update(step) == ""
        clock.advance(0.5)
    assert measure.count == count and meter.state == MemoryState("cpu", (), None, None)
    assert len(meter.take_readings()) == count and meter.take_readings() == []
    meter.measure_next()
    meter.update(10)
    assert measure.count == count + 1


def test_a_failed_measurement_is_reported_once() -> None:
    def measure() -> MemoryState:
        raise OSError("no such device")

    meter = MemoryMeter(measure, Clock(), interval=0.0)
    assert meter.update(0) == "Memory cannot be measured (OSError: no such device); training continues."
    assert meter.update(1) == "" and meter.state is None


def test_after_a_state_of_another_process_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measure(monkeypatch)
    meter = MemoryMeter(measure, Clock(), interval=0.0)
    meter.mirror(MemoryState("cuda", (), None, None))
    assert meter.update(0) == "" and measure.count == 0
    assert meter.state == MemoryState("cuda", (), None, None)
