"""What the panels draw: frozen snapshots of a session, without tensors.

Every class turns into JSON with ``dataclasses.asdict``; sizes are in bytes, times in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

TrainStatus = Literal["starting", "running", "pausing", "paused", "stopping", "finished", "stopped", "failed"]

ENDED: tuple[TrainStatus, ...] = ("finished", "stopped", "failed")
"""Statuses of a run that will publish no other state."""


@dataclass(frozen=True)
class AdapterState:
    """One adapter of one model."""

    name: str
    method: str
    """How a person calls it: ``LoRA``, ``DoRA``, ``rsLoRA``."""
    module_count: int
    targets: tuple[str, ...]
    """Distinct last path segments of the adapted modules, sorted."""
    parameter_count: int
    byte_count: int
    trainable: bool
    active: bool
    merged: bool
    scale: float = 1.0
    summary: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Its method's main settings, e.g. ``{"r": "16", "α": "32"}``; a star where some modules have other values."""
    frozen: bool = False
    """Whether it is kept from training also while it is active."""
    unsaved: bool = False
    """Whether it was trained since it was added, loaded or saved."""


@dataclass(frozen=True)
class MemoryPart:
    """One part of what is used, e.g. ``base weights``."""

    name: str
    byte_count: int
    detail: str = ""


@dataclass(frozen=True)
class MemoryState:
    """Memory of one model and of the device it is on."""

    device: str
    parts: tuple[MemoryPart, ...]
    device_total: int | None
    device_free: int | None
    peak: int | None = None
    """Highest use since the last mark, where the device counts it."""


@dataclass(frozen=True)
class LayerLoss:
    """What combining or converting adapters lost on one layer.

    Attributes:
        path: where the layer is.
        rank: rank of the result; None where the method has none.
        relative_error: distance to the true (weighted) delta over its norm.
        energy_kept: share of the true delta's energy that lies along the result.
    """

    path: str
    rank: int | None
    relative_error: float
    energy_kept: float


@dataclass(frozen=True)
class LayerChange:
    """How far an adapter moves one layer.

    Attributes:
        path: where the layer is.
        delta_norm: Frobenius norm of what it adds to the weight.
        weight_norm: that of the frozen weight.
        directions: singular directions that hold 90 % of the delta's energy; None where not counted.
        rank: of the adapter there; None for a module trained as a whole.
        intruders: strong directions of the adapted weight that the frozen one lacks; None where not counted.
    """

    path: str
    delta_norm: float
    weight_norm: float
    directions: int | None
    rank: int | None
    intruders: int | None = None

    @property
    def relative(self) -> float:
        """The delta's norm as a share of the weight's; infinite where only the weight is zero."""
        if self.weight_norm > 0:
            return self.delta_norm / self.weight_norm
        return float("inf") if self.delta_norm > 0 else 0.0


Curve = tuple[tuple[int, float], ...]
"""(step, value) pairs, decimated for drawing: bounded however long the run is."""


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt.

    Attributes:
        text: without special tokens.
        token_count: tokens of it.
        ended: whether the model ended it.
        cut: whether it reached the greatest length before that.
    """

    text: str = ""
    token_count: int = 0
    ended: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Sample:
    """What one prompt was answered while a run went on.

    Attributes:
        step: when it was asked.
        prompt: as given.
        answer: the adapter's, as it was then.
        base: the base model's, which does not change.
    """

    step: int
    prompt: str
    answer: str
    base: str = ""


MemberStatus = Literal["training", "finished", "stopped", "diverged"]


@dataclass(frozen=True)
class MemberState:
    """One of several adapters that are trained side by side, at one moment."""

    name: str
    status: MemberStatus
    step: int
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What distinguishes it from the others: field and value in words."""
    loss: float | None = None
    """Of the last step."""
    smoothed_loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    history: Curve = ()
    """The loss of each step."""
    eval_history: Curve = ()

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Sorts the best first: by the loss on held-out rows, else by the smoothed loss of training; NaN last."""
        loss = self.smoothed_loss if self.eval_loss is None else self.eval_loss
        finite = loss is not None and math.isfinite(loss)
        evaluated = self.eval_loss is not None and finite
        return self.status == "diverged", not evaluated, loss if loss is not None and finite else math.inf


@dataclass(frozen=True)
class TrainState:
    """A training run at one moment."""

    run_id: str
    adapter: str
    status: TrainStatus
    step: int
    total_steps: int | None
    epoch: float | None = None
    loss: float | None = None
    """Of the last step."""
    mean_loss: float | None = None
    """Over all steps of this run."""
    smoothed_loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    elapsed: float = 0.0
    remaining: float | None = None
    history: Curve = ()
    """The loss of each step."""
    eval_history: Curve = ()
    memory: MemoryState | None = None
    message: str = ""
    """One line for a person: why it stopped, what was done to the rows, a warning that it cannot learn."""
    warnings: tuple[str, ...] = ()
    """The parts of ``message`` that are warnings."""
    kept_step: int | None = None
    """Step whose weights the model has, where the training diverged later and they were put back."""
    first_step: int = 0
    """Steps done before, where it resumes an earlier run and counts on from there."""
    gradient_norm: float | None = None
    series: Mapping[str, Curve] = field(default_factory=dict, hash=False)
    """Further values over time: ``learning rate``, ``gradient norm``, ``tokens/s``, ``memory`` (bytes)."""
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The last values of ``compute_metrics``, without the prefix ``eval_``."""
    metric_history: Mapping[str, Curve] = field(default_factory=dict, hash=False)
    best_step: int | None = None
    """Step of the lowest evaluation loss, or of the best value of ``metric_for_best_model``."""
    samples: tuple[Sample, ...] = ()
    folder: str = ""
    """Where the run is kept, or the empty string."""
    members: tuple[MemberState, ...] = ()
    """The adapters of a sweep; the figures above are then of all together."""


@dataclass(frozen=True)
class ModelState:
    """One model that carries adapters."""

    name: str
    """The notebook variable, or another label."""
    class_name: str
    dtype: str
    device: str
    parameter_count: int
    """All parameters, adapters included."""
    trainable_count: int
    adapters: tuple[AdapterState, ...] = ()
    active: tuple[str, ...] = ()
    """Active adapters; empty when only the base model is active."""
    enabled: bool = True
    merged: tuple[str, ...] = ()
    memory: MemoryState | None = None
    training: TrainState | None = None
    quantization: str = ""
    """Backend of the quantized layers, e.g. ``bnb4bit``; empty for a dense model."""
    offloaded_count: int = 0
    """Adapters of its pool that are not on the model now; they come when they are named."""


@dataclass(frozen=True)
class PastState:
    """What is left of a model that is gone: adapters that were trained and not saved, without their base model."""

    name: str
    """What it is called now, e.g. ``model (before)``."""
    adapters: str
    """Their names, and which runs on disk have them, too."""


@dataclass(frozen=True)
class SessionState:
    """Everything the panels know."""

    models: tuple[ModelState, ...] = ()
    current: str | None = None
    """Name of the model that was used last."""
    busy: str = ""
    """What is running, in words, or the empty string."""
    revision: int = 0
    """Grows with every published state."""
    notes: tuple[str, ...] = field(default=())
    past: tuple[PastState, ...] = ()
    """Models that are gone, and of which adapters can be brought back; the last one last."""

    def model(self, name: str | None = None) -> ModelState | None:
        """Returns the model of that name, the one used last for None, or None if it is not there."""
        wanted = self.current if name is None else name
        return next((model for model in self.models if model.name == wanted), None)
