from __future__ import annotations

from typing import Any

import pytest
import torch

from nbpeft.memory.checkpointing import disable_checkpointing, enable_checkpointing, is_checkpointing
from tests.tiny_models import llama


class Older:
    """The names of transformers before 5.24."""

    def __init__(self) -> None:
        self.options: dict[str, Any] | None = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.options is not None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.options = gradient_checkpointing_kwargs

    def gradient_checkpointing_disable(self) -> None:
        self.options = None


class Oldest:
    """As models of other libraries have it: without options."""

    def __init__(self) -> None:
        self.on = False

    def gradient_checkpointing_enable(self) -> None:
        self.on = True


def test_older_names() -> None:
    model = Older()
    assert not is_checkpointing(model)
    enable_checkpointing(model, {"preserve_rng_state": False})
    assert is_checkpointing(model) and model.options == {"use_reentrant": False, "preserve_rng_state": False}
    disable_checkpointing(model)
    assert not is_checkpointing(model)
    other = Oldest()
    enable_checkpointing(other)
    assert other.on and not is_checkpointing(other)
    with pytest.raises(AttributeError, match="gradient_checkpointing_enable"):
        enable_checkpointing(torch.nn.Linear(2, 2))


def test_names_of_the_installed_transformers(recwarn: pytest.WarningsRecorder) -> None:
    model = llama()
    assert not is_checkpointing(model)
    enable_checkpointing(model, {"use_reentrant": True})
    assert is_checkpointing(model)
    disable_checkpointing(model)
    assert not is_checkpointing(model)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]
