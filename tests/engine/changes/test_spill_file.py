"""Copies that wait on disk for something to go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbpeft.engine.changes import spill_file
from nbpeft.engine.changes.spill_file import SpillFile
from nbpeft.errors import MergeError
from tests.engine.runtime.test_scopes import adapted, output


def memory(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    monkeypatch.setattr(spill_file, "host_memory", lambda: (total, free))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("total", "free", "on_disk"), [(10**9, 10**9, True), (10, 1, True), (10, 9, False)])
def test_a_copy_is_the_same_wherever_it_is(
    dtype: torch.dtype, total: int, free: int, on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, total, free)
    kept = SpillFile()
    tensors = [torch.arange(12).to(dtype).view(3, 4), torch.ones(2, 2, dtype=dtype).T, torch.empty(0, 4, dtype=dtype)]
    copies = [kept.keep(tensor) for tensor in tensors]
    values = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    assert all(torch.equal(read(), value) for read, value in zip(copies, values, strict=True))
    assert (kept._file is not None) is on_disk


def test_a_full_disk_leaves_it_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Any:
        raise OSError(28, "No space left on device")

    memory(monkeypatch, 10**9, 10**9)
    monkeypatch.setattr(spill_file.tempfile, "TemporaryFile", full)
    assert torch.equal(SpillFile().keep(torch.ones(3))(), torch.ones(3))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_merge_for_good_that_fails_at_its_end_comes_back(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    before, base = output(model), model.get_base_model()
    weights = {name: value.clone() for name, value in base.state_dict().items()}

    def fail(*_: object) -> None:
        raise MergeError("at the end")

    monkeypatch.setattr(spill_file, "_CACHED", share)
    monkeypatch.setattr("nbpeft.engine.runtime.manager.untie_embeddings_", fail)
    with pytest.raises(MergeError, match="at the end"):
        model.merge_and_unload()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert torch.equal(output(model), before)
    assert model.manager._transaction.spill._file is None
