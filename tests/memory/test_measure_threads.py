"""Measuring in one thread while another trains."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from nbpeft.memory.measure import Meter


def gradients(meter: Meter) -> int:
    return next(part.byte_count for part in meter.read().parts if part.name == "gradients")


def test_only_the_thread_that_trains_reads_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    # Backward sets them without the interpreter's lock: another thread that reads one crashes the process now and then.
    monkeypatch.setattr(importlib.import_module("nbpeft.memory.measure"), "_training_thread", None)
    model = nn.Linear(4, 4, bias=False)
    meter, optimizer = Meter(model), torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(gradients, meter).result() == 0
        assert gradients(meter) == 64
        assert other.submit(gradients, meter).result() == 64, "as it was found last"
        other.submit(optimizer.step).result()
        model.weight.grad = None
        assert gradients(meter) == 64, "another thread trains now"
        assert other.submit(gradients, meter).result() == 0
    model(torch.ones(1, 4)).sum().backward()
    assert gradients(meter) == 64, "that thread has ended"
