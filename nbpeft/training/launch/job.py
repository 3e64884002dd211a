"""What the processes of a training are given, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

JOB, RESULT = "job.pt", "result"
"""In the folder of a job: the TrainRequest, and the trained adapters."""
ON_THE_CPU = "on-the-cpu"
"""A file that says that weights are not to be moved to a card: they are sharded, which a Trainer does from there."""


@dataclass(frozen=True)
class Ended:
    """How it ended.

    Attributes:
        status: of the run.
        metrics: what the Trainer reports.
        token_count: input tokens of all steps.
    """

    status: Literal["finished", "stopped"]
    metrics: Mapping[str, float]
    token_count: int
