from __future__ import annotations

import mmap
import sys

import pytest
import torch

from nbpeft._util import host_memory
from nbpeft._util.device_names import DEVICES, WITHOUT_BFLOAT16
from nbpeft.memory import devices
from nbpeft.memory.devices import DeviceMemory, device_memory, has_bfloat16, join, mark_peak, peak
from nbpeft.model.quantization.quantize import usual_dtype

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_host_memory_is_plausible():
    memory = device_memory(CPU)
    assert memory.total is not None and memory.total > 2**28
    if memory.free is not None:
        assert 0 < memory.free < memory.total
    if memory.used is not None:
        assert 2**24 < memory.used < memory.total


@linux
def test_used_follows_allocations():
    before = device_memory(CPU).used
    with mmap.mmap(-1, 2**26) as block:  # torch might take what an earlier test gave back to the heap
        block.write(b"\1" * len(block))
        after = device_memory(CPU).used
        assert before is not None and after is not None
        assert abs(after - before - len(block)) < 2**23


@linux
def test_peak_since_a_mark():
    mark_peak(CPU)
    start = peak(CPU)
    block = torch.ones(2**25)
    size = block.nbytes
    del block
    high = peak(CPU)
    mark_peak(CPU)
    low = peak(CPU)
    assert start is not None and high is not None and low is not None
    assert high - start > 0.9 * size
    assert high - low > 0.9 * size


@linux
def test_a_container_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{2**28}\n")
    (tmp_path / "memory.current").write_text(f"{2**27}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {2**26}\n")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    memory = device_memory(CPU)
    assert memory.total == 2**28
    assert memory.free == 2**28 - 2**27 + 2**26
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = device_memory(CPU).total
    assert unlimited is not None and unlimited > 2**28


def test_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_PROC", tmp_path)
    memory = device_memory(CPU)
    assert memory.total is None or memory.total > 2**28
    value = peak(CPU)
    assert value is None or value > 2**20


def test_join():
    assert join([DeviceMemory(3, 2, 1), DeviceMemory(30, 20, 10)]) == DeviceMemory(33, 22, 11)
    assert join([DeviceMemory(3, 2, None), DeviceMemory(30, 20, 10)]) == DeviceMemory(33, 22, None)
    assert join([]) == DeviceMemory(None, None, None)


def test_meta_device():
    assert device_memory(torch.device("meta")) == DeviceMemory(None, None, None)
    assert peak(torch.device("meta")) is None


def test_cards_before_ampere_have_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(DEVICES) > WITHOUT_BFLOAT16
    assert not has_bfloat16("T4") and not has_bfloat16("Tesla T4") and not has_bfloat16("2080 Ti")
    assert all(map(has_bfloat16, ("A100 40GB", "M2-16GB", "16GB", "cpu", None, torch.device("meta"))))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, half in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert has_bfloat16("cuda:0") == has_bfloat16(torch.device("cuda")) == (half == torch.bfloat16)
        assert usual_dtype() == half
