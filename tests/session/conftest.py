from __future__ import annotations

from typing import Any

import pytest

from nbpeft.session import Session
from tests.tiny_models import llama, randomize


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def two_adapters(session: Session) -> Any:
    """Adapters ``orders`` (rank 4, active) and ``pirate`` (rank 2, other targets)."""
    made = session.add(llama(), {"r": 4, "target_modules": ["q_proj", "v_proj"]}, name="pirate", variable="model")
    handle = made.model
    session.add(handle, {"r": 2, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 16}, name="orders")
    randomize(handle, "pirate", 1)
    randomize(handle, "orders", 2)
    return handle.eval()
