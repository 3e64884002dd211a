"""What the cases of clients share: their registry, and configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Case = Callable[[Any, str], list[Any]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Notes a case: it is given PEFT, or nbpeft in its place, and an empty folder."""
    CASES[function.__name__] = function
    return function


def config(peft: Any, rank: int = 4, seed: int = 0, **fields: Any) -> Any:
    """A LoRA config whose adapters do not start at zero, and the seed that they are made from."""
    torch.manual_seed(seed)
    usual = {"init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
    return peft.LoraConfig(r=rank, **{**usual, **fields})


def refused(kind: type[Exception] | None, call: Callable[..., object], *args: Any, **kwargs: Any) -> bool:
    """Whether a call ends with an error of a class, or without one."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return kind is not None and isinstance(error, kind)
    return kind is None
