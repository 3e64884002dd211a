"""Which terms of methods a loss includes is read from its autograd graph."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch

from nbpeft.engine.contract import loss_terms
from nbpeft.engine.contract.loss_terms import marked_sum, terms_in


def test_a_search_ends_once_the_wanted_terms_are_found() -> None:
    manager = object()
    near, far = (marked_sum(manager, {name: [torch.ones((), requires_grad=True)]}) for name in ("near", "far"))
    assert near is not None and far is not None
    loss = near + far.exp().exp().exp()
    assert terms_in(loss) == {(manager, "near"), (manager, "far")}
    assert terms_in(loss, [(manager, "near")]) == {(manager, "near")}
    assert terms_in(loss, [(manager, "far")]) == {(manager, "near"), (manager, "far")}
    assert terms_in(loss.detach()) == set()


def test_a_node_that_is_reached_along_many_paths_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class Counted(deque[Any]):
        def popleft(self) -> Any:
            taken.append(super().popleft())
            return taken[-1]

    monkeypatch.setattr(loss_terms, "deque", Counted)
    loss: Any = marked_sum("manager", {"a": [torch.ones((), requires_grad=True)]})
    for _ in range(8):  # 256 paths
        loss = loss.sin() + loss.cos()
    assert terms_in(loss) == {("manager", "a")} and len(taken) == 8 * 3 + 1
