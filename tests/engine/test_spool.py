"""Copies that go to disk where memory is short."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nbpeft.engine import spool
from nbpeft.errors import MergeError
from tests.engine.test_scopes import adapted, output

Free = Callable[[int], None]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    """Sets how many of 100 bytes of memory are free."""
    return lambda number: monkeypatch.setattr(spool, "host_memory", lambda: (100, number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_they_hold_the_same(free: Free, dtype: torch.dtype) -> None:
    tensor = torch.arange(12).to(dtype).view(3, 4)
    free(50)
    assert spool.spooled(tensor) is tensor
    free(5)
    copied = spool.spooled(tensor)
    assert copied.data_ptr() != tensor.data_ptr() and torch.equal(copied, tensor)
    assert spool.spooled(tensor[:0]).shape == (0, 4)


def test_a_full_disk_leaves_them_in_memory(free: Free, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    free(5)
    monkeypatch.setattr(spool.os, "posix_fallocate", full)
    tensor = torch.ones(3)
    assert spool.spooled(tensor) is tensor


def test_a_merge_for_good_comes_back_from_disk(free: Free, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    before, base = output(model), model.get_base_model()
    weights = {name: value.clone() for name, value in base.state_dict().items()}

    def fail(*_: object) -> None:
        raise MergeError("at the end")

    free(5)
    monkeypatch.setattr("nbpeft.engine.manager.part_for_good", fail)
    with pytest.raises(MergeError, match="at the end"):
        model.merge_and_unload()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert torch.equal(output(model), before)
