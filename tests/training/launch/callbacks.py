"""Callbacks that processes of a training import."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback


class FailsInTheSecond(TrainerCallback):
    """Raises after two steps in process 1."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == 2:
            raise ValueError("the second of them is out of rows")
