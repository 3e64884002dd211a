"""Which terms of methods a loss includes is read from its autograd graph."""

from __future__ import annotations

import torch

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
