"""The state that the panels show: immutable snapshots of a session, without tensors.

``dataclasses.asdict`` converts every class to JSON types. Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nbpeft.jsonable import AsDict

TrainStatus = Literal["starting", "running", "pausing", "paused", "stopping", "finished", "stopped", "failed"]

ENDED: tuple[TrainStatus, ...] = ("finished", "stopped", "failed")
"""Final statuses of a run: no further state follows."""


@dataclass(frozen=True)
class AdapterState:
    """One adapter of one model."""

    name: str
    method: str
    """Display name of the method: ``LoRA``, ``DoRA``, ``rsLoRA``."""
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
    """Main settings of its method, e.g. ``{"r": "16", "α": "32"}``; a value with ``*`` differs on some modules."""
    frozen: bool = False
    """Whether it is frozen, so that it does not train even while it is active."""
    unsaved: bool = False
    """Whether it was trained since it was added, loaded or saved."""
    system: str | None = None
    """System prompt with which it is asked by default, empty for none; None if it is unknown how it was trained."""


@dataclass(frozen=True)
class MemoryPart:
    """One part of the memory in use, e.g. ``base weights``, in bytes."""

    name: str
    byte_count: int
    detail: str = ""


@dataclass(frozen=True)
class StoredPart:
    """One part of the base weights.

    Attributes:
        name: ``quantized layers``, ``experts``, ``embedding``, ``head``, ``other layers`` or ``norms and biases``.
        module_count: number of modules with these weights; for experts, of tensors.
        byte_count: size in bytes, including quantization constants.
        bfloat16_bytes: size of the same weights in bfloat16, in bytes.
        kinds: the storage formats, e.g. ``nf4 double``.
        before: previous size in bytes, or None if it was never loaded in another form.
    """

    name: str
    module_count: int
    byte_count: int
    bfloat16_bytes: int
    kinds: tuple[str, ...]
    before: int | None = None

    @property
    def share(self) -> float:
        """Size relative to that in bfloat16."""
        return self.byte_count / self.bfloat16_bytes if self.bfloat16_bytes else 1.0


@dataclass(frozen=True)
class MemoryState(AsDict):
    """Memory of one model and of its device, in bytes; None for what the device does not report."""

    device: str
    parts: tuple[MemoryPart, ...]
    device_total: int | None
    device_free: int | None
    peak: int | None = None
    """Peak memory since the peak was last reset."""


@dataclass(frozen=True)
class LayerLoss:
    """The approximation error of combining or converting adapters on one layer.

    Attributes:
        path: module path of the layer.
        rank: rank of the result; None if its method has no rank.
        relative_error: norm of the difference to the exact (weighted) delta, divided by the norm of the exact delta.
        energy_kept: share of the exact delta's energy (squared norm) in the direction of the result, 0 to 1.
    """

    path: str
    rank: int | None
    relative_error: float
    energy_kept: float


@dataclass(frozen=True)
class LayerChange:
    """How much an adapter changes one layer.

    Attributes:
        path: module path of the layer.
        delta_norm: Frobenius norm of the delta that the adapter adds to the weight.
        weight_norm: Frobenius norm of the frozen weight.
        directions: number of singular directions with 90 % of the delta's energy; None if not computed.
        rank: rank of the adapter on this layer; None for a module trained as a whole.
        intruders: number of intruder dimensions: strong singular directions of the adapted weight that the frozen
            weight does not have; None if not computed.
    """

    path: str
    delta_norm: float
    weight_norm: float
    directions: int | None
    rank: int | None
    intruders: int | None = None

    @property
    def relative(self) -> float:
        """Norm of the delta divided by the norm of the weight; infinite if only the weight is zero."""
        if self.weight_norm > 0:
            return self.delta_norm / self.weight_norm
        return float("inf") if self.delta_norm > 0 else 0.0


Curve = tuple[tuple[int, float], ...]
"""(step, value) pairs, decimated for drawing, so that their number is bounded for runs of any length."""


@dataclass(frozen=True)
class Answer:
    """A generated answer to a prompt.

    Attributes:
        text: the text without special tokens.
        token_count: number of generated tokens.
        ended: whether the model ended the answer with an EOS token.
        cut: whether it reached the maximum length before it ended.
    """

    text: str = ""
    token_count: int = 0
    ended: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Sample:
    """An answer that was generated during a run.

    Attributes:
        step: training step at which it was generated.
        prompt: the prompt.
        answer: answer with the adapter at that step.
        base: answer of the base model.
        wanted: the wanted answer; empty if it is unknown.
        reward: its reward, if the training learns from rewards.
        cut: whether the answer reached the limit of tokens.
        base_cut: whether that of the base model did.
    """

    step: int
    prompt: str
    answer: str
    base: str = ""
    wanted: str = ""
    reward: float | None = None
    cut: bool = False
    base_cut: bool = False


MemberStatus = Literal["training", "finished", "stopped", "diverged"]


@dataclass(frozen=True)
class MemberState:
    """State of one of the adapters that are trained side by side in a sweep."""

    name: str
    status: MemberStatus
    step: int
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Field -> value as text, for the fields that distinguish it from the others."""
    loss: float | None = None
    """Loss of the last step."""
    smoothed_loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    history: Curve = ()
    """The loss of each step."""
    eval_history: Curve = ()
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Scores and values of ``compute_metrics`` of its current weights, or of the last evaluation."""
    metric_history: Mapping[str, Curve] = field(default_factory=dict, hash=False)
    metric: str = ""
    """Name of the metric by which the adapters are ranked; empty for the evaluation loss."""
    score: float | None = None
    """Value by which it is ranked, the lowest first; None if it was not evaluated."""
    best_step: int | None = None
    """Step of its best evaluation."""
    comparable: bool = True
    """Whether it was trained and evaluated on the same rows as the others, so that one of them can be the best."""
    restored_step: int | None = None
    """Step of the weights that were restored at its end: the best ones, or the last good ones; None for its last."""

    @property
    def is_measured(self) -> bool:
        """Whether it has a loss or a score by which it can be ranked."""
        return any(value is not None for value in (self.score, self.eval_loss, self.smoothed_loss))

    @property
    def rank(self) -> tuple[bool, int, float, float]:
        """Sort key, the best first: by ``score``, else by evaluation loss, else by smoothed training loss.

        Of equal scores the lower loss is first. NaN and diverged adapters are last.
        """
        loss = self.smoothed_loss if self.eval_loss is None else self.eval_loss
        loss = loss if loss is not None and math.isfinite(loss) else math.inf
        for place, value in enumerate((self.score, self.eval_loss, self.smoothed_loss)):
            if value is not None:
                finite = math.isfinite(value)
                return self.status == "diverged", place if finite else 3, value if finite else math.inf, loss
        return self.status == "diverged", 3, math.inf, loss


@dataclass(frozen=True)
class NamedRows:
    """The rows to score a trained adapter on, as a cell named them."""

    text: str = ""
    """What follows ``--data`` in a line, with the options for these rows; empty if no cell named them."""
    learned: bool = False
    """Whether the adapter was trained on them, because there are no others."""
    held_out: bool = False
    """Whether some of them were held out for evaluation."""
    own: tuple[tuple[str, str], ...] = ()
    """(adapter, its rows) for adapters that each have their own; ``text`` is then empty."""
    columns: str = ""
    """The option for the columns of ``own``."""
    unmapped: tuple[str, ...] = ()
    """The adapters to whose rows it does not apply."""
    numbered: bool = False
    """Whether it is known which rows were held out."""
    trained_on: str = ""
    """The rows of the training, as a cell named them; empty if none did, or for rows of each adapter's own."""

    def of(self, adapter: str) -> str:
        """The rows of an adapter, as ``text``; empty if no cell named them."""
        own = dict(self.own).get(adapter)
        if own is None:
            return self.text
        return own if not self.columns or adapter in self.unmapped else f"{own} {self.columns}"


@dataclass(frozen=True)
class TrainState:
    """State of a training run."""

    run_id: str
    adapter: str
    status: TrainStatus
    step: int
    total_steps: int | None
    epoch: float | None = None
    loss: float | None = None
    """Loss of the last step."""
    mean_loss: float | None = None
    """Mean loss of all steps of this run."""
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
    """One line for the user: why it stopped, how the rows were changed, a warning that it cannot learn."""
    warnings: tuple[str, ...] = ()
    """The parts of ``message`` that are warnings."""
    errors: tuple[str, ...] = ()
    """The parts of ``message`` that are errors: why the training diverged."""
    kept_step: int | None = None
    """Step whose weights were restored after training diverged; None if that did not happen."""
    restored_step: int | None = None
    """Step of the best evaluation, whose weights were restored at the end; None if that did not happen."""
    first_step: int = 0
    """Last step of the earlier run that this one resumes; steps are counted from there."""
    gradient_norm: float | None = None
    series: Mapping[str, Curve] = field(default_factory=dict, hash=False)
    """Name -> further values over time: ``learning rate``, ``gradient norm``, ``tokens/s``, ``memory`` (bytes), and the
    curves of the objective, such as ``rewards/margins``."""
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Last values of ``compute_metrics``, without the prefix ``eval_``."""
    metric_history: Mapping[str, Curve] = field(default_factory=dict, hash=False)
    best_step: int | None = None
    """Step of the lowest evaluation loss, or of the best value of ``metric_for_best_model``."""
    samples: tuple[Sample, ...] = ()
    folder: str = ""
    """Folder in which the run is recorded, or the empty string."""
    kept_id: str = ""
    """Id of the run in that folder, which stays when it is renamed; the empty string without one."""
    members: tuple[MemberState, ...] = ()
    """The adapters of a sweep; the figures above then refer to all of them."""
    rows: NamedRows = NamedRows()
    """The rows to score it on."""
    headline: tuple[str, ...] = ("loss",)
    """The curves by which it is judged, as its objective names them; without ``loss`` where that says nothing."""
    adapters: tuple[str, ...] = ()
    """The adapters, where they are several; ``adapter`` then has their names as text."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the trained adapters."""
        return self.adapters or ((self.adapter,) if self.adapter else ())

    @property
    def figures(self) -> dict[str, float]:
        """The last value of each curve of the headline, as far as there is one; in a sweep of the best adapter."""
        return self.figures_of(self.best_member)

    def figures_of(self, member: MemberState | None) -> dict[str, float]:
        """Returns the last value of each curve of the headline, as far as there is one, of an adapter of a sweep."""
        loss = self.loss if member is None else member.smoothed_loss
        last = {name: curve[-1][1] for name in self.headline if (curve := self.curve(name, member))}
        last |= {} if loss is None else {"loss": loss}
        return {name: last[name] for name in self.headline if name in last}

    def curve(self, name: str, member: MemberState | None) -> Curve:
        """Returns a curve of the objective, of an adapter of a sweep."""
        return self.series.get(name if member is None else f"{name}/{member.name}", ())

    @property
    def best_member(self) -> MemberState | None:
        """The best adapter of a sweep; None for other trainings, before a loss, and if each has rows of its own."""
        comparable = (member for member in self.members if member.comparable and member.is_measured)
        return min(comparable, key=lambda member: member.rank, default=None)


@dataclass(frozen=True)
class ModelState:
    """State of one model with adapters."""

    name: str
    """Name of the notebook variable, or another label."""
    class_name: str
    dtype: str
    device: str
    parameter_count: int
    """Number of all parameters, including adapters."""
    trainable_count: int
    adapters: tuple[AdapterState, ...] = ()
    active: tuple[str, ...] = ()
    """Names of the active adapters; empty if only the base model is active."""
    enabled: bool = True
    merged: tuple[str, ...] = ()
    memory: MemoryState | None = None
    training: TrainState | None = None
    quantization: str = ""
    """Backend of the quantized layers, e.g. ``bnb4bit``; empty for a dense model."""
    offloaded_count: int = 0
    """Number of adapters in its pool that are not on the model now; they are loaded when they are used."""
    replaced: tuple[str, ...] = ()
    """Adapters that no longer have the weights of their last training: they were reset, swapped or loaded again."""
    generates: bool = True
    """Whether it answers prompts, as a language model does and a classifier does not."""
    scored: bool = True
    """Whether ``score`` takes it without a metric, as a language model or a classifier of texts; True before its first
    training."""


@dataclass(frozen=True)
class PastState:
    """Trained and unsaved adapters of a model that no longer exists, without their base model."""

    name: str
    """Label of the former model, e.g. ``model (before)``."""
    adapters: str
    """Names of the adapters, and the runs on disk that have them too, as text."""


@dataclass(frozen=True)
class SessionState:
    """The whole state of a session, as the panels show it."""

    models: tuple[ModelState, ...] = ()
    current: str | None = None
    """Name of the model that was used last."""
    busy: str = ""
    """Description of the running command, or the empty string."""
    revision: int = 0
    """Number that increases with every published state."""
    notes: tuple[str, ...] = field(default=())
    past: tuple[PastState, ...] = ()
    """Former models whose adapters can be restored, the most recent one last."""

    def model(self, name: str | None = None) -> ModelState | None:
        """Returns the model of a name, or for None the one used last; None if there is no such model."""
        wanted = self.current if name is None else name
        return next((model for model in self.models if model.name == wanted), None)
