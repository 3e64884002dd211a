"""Loss terms of adapters that train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbpeft.engine.runtime import method_hooks


@pytest.mark.parametrize(("items", "shifts", "wanted"), [(None, True, 3.0), (8, False, 1.5), (12, True, 0.5)])
def test_a_batch_adds_its_share_of_the_terms(
    items: int | None, shifts: bool, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method_hooks, "extra_loss", lambda manager: torch.tensor(3.0))
    labels, manager = torch.tensor([[1, 2, -100], [3, 4, -100]]), object()
    found: Any = method_hooks.extra_loss_of_call(manager, labels, items, shifts=shifts)
    assert float(found) == wanted
