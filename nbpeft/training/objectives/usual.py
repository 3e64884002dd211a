"""The objectives whose loss is the model's own: ``sft`` and ``classify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nbpeft.training.objectives.objective import Objective


@dataclass(frozen=True)
class Sft(Objective):
    """Supervised fine-tuning: the next-token loss of the tokens with labels."""

    name: ClassVar[str] = "sft"


@dataclass(frozen=True)
class Classify(Objective):
    """The loss of a classifier of texts or tokens."""

    name: ClassVar[str] = "classify"
