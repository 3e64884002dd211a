"""What the tests of several objectives have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbpeft.training.transformers.objective_trainer import ObjectiveTrainer


@pytest.fixture
def computed(monkeypatch: Any) -> list[torch.Tensor]:
    """The tokens of the batches of which the reference was computed."""
    found: list[torch.Tensor] = []
    original = ObjectiveTrainer.log_probs_of_the_reference

    def counted(trainer: Any, model: Any, batch: Any) -> Any:
        found.append(batch["input_ids"])
        return original(trainer, model, batch)

    monkeypatch.setattr(ObjectiveTrainer, "log_probs_of_the_reference", counted)
    return found
