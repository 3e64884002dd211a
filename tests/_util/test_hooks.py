from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from nbpeft import LoraConfig, get_peft_model
from nbpeft._util import hooks


def test_what_is_registered_runs_with_every_handle_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Callable[[], None]] = []
    monkeypatch.setattr(hooks.adapted, "_calls", calls)
    seen: list[int] = []

    def note() -> None:
        seen.append(1)

    hooks.when_adapted(note)
    hooks.when_adapted(note)
    assert calls == [note] and not seen
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert len(seen) == 1
    copy.deepcopy(model)
    assert len(seen) == 2, "a copy, as one from a file or another process, is an adapted model too"
