"""The job that the processes of a training get, and the result they return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

JOB, RESULT = "job.pt", "result"
"""In the folder of a job: the file with the job, and the folder with the trained adapters."""
ON_THE_CPU = "on-the-cpu"
"""A marker file: the weights stay on the CPU, because they are sharded, which a Trainer does from there."""


@dataclass(frozen=True)
class Job:
    """The content of a training job.

    Attributes:
        model: the model with its adapters; the active ones are trained.
        rows: the tokenised training rows.
        eval_rows: the tokenised evaluation rows, or None.
        arguments: further arguments of ``nbpeft.training.train``.
    """

    model: nn.Module
    rows: Any
    eval_rows: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)


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
