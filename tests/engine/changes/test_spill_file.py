"""Backups of weights, in memory and on disk, for the case that something goes wrong."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nbpeft import LoraConfig, get_peft_model
from nbpeft.engine.changes import spill_file
from nbpeft.engine.changes.spill_file import SpillFile
from nbpeft.errors import MergeError
from tests.engine.runtime.test_scopes import adapted, output
from tests.faults.harness import FailingAt

PLENTY, LITTLE = (10**9, 10**9), (10**9, 10**8)


def memory(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    monkeypatch.setattr(spill_file, "host_memory", lambda: (total, free))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("host", "on_disk"), [(PLENTY, False), (LITTLE, True)])
def test_a_copy_is_the_same_wherever_it_is(
    dtype: torch.dtype, host: tuple[int, int], on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, *host)
    kept = SpillFile()
    tensors = [torch.arange(12).to(dtype).view(3, 4), torch.ones(2, 2, dtype=dtype).T, torch.empty(0, 4, dtype=dtype)]
    copies = [kept.keep(tensor) for tensor in tensors]
    values = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    assert all(torch.equal(read(), value) for read, value in zip(copies, values, strict=True))
    assert (kept._file is not None) is on_disk


def test_blocks_of_memory_are_filled_until_too_little_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    free = itertools.chain([400, 330], itertools.repeat(270))
    monkeypatch.setattr(spill_file, "host_memory", lambda: (1000, next(free)))
    monkeypatch.setattr(spill_file, "_BLOCK", 128)
    kept = SpillFile()
    tensors = [torch.full((size,), value, dtype=torch.int8) for value, size in enumerate((3, 64, 64, 70, 60))]
    copies = [kept.keep(tensor) for tensor in tensors]
    assert all(torch.equal(read(), tensor) for read, tensor in zip(copies, tensors, strict=True))
    assert kept._size == 70, "of a size that no block has room for"


@pytest.mark.parametrize("host", [PLENTY, LITTLE])
def test_memory_that_is_refused_is_not_needed(host: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise MemoryError

    memory(monkeypatch, *host)
    kept = SpillFile()
    monkeypatch.setattr(np, "empty", refuse)
    assert torch.equal(kept.keep(torch.ones(3))(), torch.ones(3)) and kept._file is not None


def test_a_full_disk_leaves_it_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Any:
        raise OSError(28, "No space left on device")

    memory(monkeypatch, *LITTLE)
    monkeypatch.setattr(spill_file.tempfile, "TemporaryFile", full)
    assert torch.equal(SpillFile().keep(torch.ones(3))(), torch.ones(3))


def test_a_file_system_that_cannot_reserve_space_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    memory(monkeypatch, *LITTLE)
    monkeypatch.setattr(spill_file.os, "posix_fallocate", refuse, raising=False)
    kept = SpillFile()
    assert torch.equal(kept.keep(torch.ones(3))(), torch.ones(3)) and kept._file is not None


@pytest.mark.parametrize("host", [PLENTY, LITTLE])
def test_a_merge_for_good_that_fails_at_its_end_comes_back(
    host: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    before, base = output(model), model.get_base_model()
    weights = {name: value.clone() for name, value in base.state_dict().items()}

    def fail(*_: object) -> None:
        raise MergeError("at the end")

    memory(monkeypatch, *host)
    monkeypatch.setattr("nbpeft.engine.runtime.unloading.untie_embeddings_", fail)
    with pytest.raises(MergeError, match="at the end"):
        model.merge_and_unload()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert torch.equal(output(model), before)
    assert model.manager._transaction.spill._file is None


def wide(dtype: torch.dtype | str) -> nn.Module:
    """Two layers of a dtype, or in nf4."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64, bias=bias) for bias in (True, False)]
    if dtype != "nf4":
        return nn.Sequential(*layers).to(dtype)  # type: ignore[arg-type]
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(*(bnb.nn.Linear4bit(64, 64, layer.bias is not None, quant_type="nf4") for layer in layers))
    model.load_state_dict(nn.Sequential(*layers).state_dict())
    return model.to("cpu")


@pytest.mark.filterwarnings("ignore:merging into bnb4bit weights rounds them again")
@pytest.mark.parametrize(
    ("dtype", "host", "step"),
    [(dtype, host, 1) for dtype in (torch.float32, torch.bfloat16, torch.float16) for host in (PLENTY, LITTLE)]
    + [("nf4", PLENTY, 60)],
)
def test_a_merge_for_good_that_fails_anywhere_restores_every_bit(
    dtype: torch.dtype | str, host: tuple[int, int], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, *host)
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model: Any = get_peft_model(wide(dtype), config)
    weights = [layer.weight for layer in model.manager.layers.values()]
    before = [weight.detach().clone() for weight in weights]
    for number in itertools.count(1, step):
        failing = FailingAt((number, "behind"))
        try:
            with failing:
                model.merge_and_unload()
        except Exception:
            assert failing.fired
            assert all(map(torch.equal, weights, before)), f"operation {number}"
            continue
        assert number > 20 and not any(map(torch.equal, weights, before))
        return
