"""Parameters of the base model that belong to an adapter."""

from __future__ import annotations

import torch
from torch import nn

from nbpeft.engine.changes.active_state import ActiveState
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.injection.biases import BaseBiases


def test_biases_that_are_made_permanent_belong_to_no_adapter() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    biases = BaseBiases(model)
    with Transaction(ActiveState(), lambda: None).block() as change:
        biases.start("a", ["0.bias"], {"0.bias": torch.ones(2)}, change)
    assert biases.are_trained and biases.of("a").keys() == {"0.bias"}
    biases.forget("a")
    assert not biases.are_trained and not biases.of("a") and not biases.originals("a")
    biases.check("b", ["0.bias"])
    assert model[0].bias.tolist() == [1.0, 1.0]
