"""The job that the processes of a training get, and the result they return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

JOB, RESULT = "job.pt", "result"
"""In the folder of a job: the TrainRequest, and the trained adapters."""
ON_THE_CPU = "on-the-cpu"
"""A marker file: the weights stay on the CPU, because they are sharded, which a Trainer does from there."""


@dataclass(frozen=True)
class Ended:
    """The end of a training.

    Attributes:
        status: the last status of the run.
        metrics: the metrics that the Trainer reports.
        token_count: input tokens of all steps.
    """

    status: Literal["finished", "stopped"]
    metrics: Mapping[str, float]
    token_count: int
