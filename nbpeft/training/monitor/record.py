"""The numbers of a run: steps, losses, tokens, speed, and curves of limited size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nbpeft.state import Curve

Number = float | Tensor
OF_REWARDS = ("reward", "reward_std", "frac_reward_zero_std", "kl")
"""The names of an objective's curves that have no slash."""
GRADIENT_NORM = "gradient norm"
OF_STEPS = ("learning rate", GRADIENT_NORM, "tokens/s", "memory")
"""The names of the curves that every run has."""
SERIES = (*OF_STEPS, *OF_REWARDS)
"""The names of curves in ``TrainState.series``. Those of an objective, such as ``rewards/margins``, are there too; all
other curves are metrics."""
_SMALL = 60
"""The number of buckets of curves that are drawn small."""
_HIGH_LOSS, _RISE, _GROWTH = 8.0, 3.0, 1.5
"""A loss above the first, higher than all before by the second, and as many times as high as the third, is a rise."""
_LARGEST_ENTROPY = 15.0
"""Losses that begin above this are no cross-entropies: the logarithm of a vocabulary's size is less."""


def is_of_objective(name: str) -> bool:
    """Whether a value that a Trainer logs belongs to a curve of the objective."""
    return "/" in name or name in OF_REWARDS


def is_measured(name: str) -> bool:
    """Whether a curve is a metric of evaluations, and not a value of the training steps."""
    return name.startswith("eval_") or ("/" not in name and name not in SERIES)


def is_better(score: float | None, best: float | None) -> bool:
    """Whether a score is better than the best one so far; lower is better, and NaN or infinity is never better.

    Args:
        score: the new score, or None.
        best: the best score so far, or None.
    """
    return score is not None and math.isfinite(score) and (best is None or score < best)


def score_of(args: Any, reported: Mapping[str, Any]) -> float | None:
    """The score by which the best evaluation is found, lower is better: the loss, or ``metric_for_best_model``.

    A value of None counts as NaN, because JSON files have None in its place.

    Args:
        args: ``TrainingArguments``.
        reported: the metrics that a Trainer reports of an evaluation.

    Returns:
        The score; None if the metric was not measured.
    """
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    value = reported.get(f"eval_{name}", "")
    value = math.nan if value is None else value
    if not isinstance(value, int | float):
        return None
    greater = args.greater_is_better if args.greater_is_better is not None else not name.endswith("loss")
    return -float(value) if greater else float(value)


class History:
    """A curve of (step, value) pairs, reduced to the lowest and the highest value per bucket of steps.

    All points are stored until there are more than ``buckets`` of them; from then on adjacent
    buckets are merged whenever there are too many. Spikes are preserved, and at most
    ``2 * buckets`` points remain.

    Args:
        buckets: The greatest number of buckets; even and at least 2.
    """

    def __init__(self, buckets: int = 240) -> None:
        self._limit = buckets
        self._width = 1
        self._buckets: dict[int, tuple[tuple[int, float], tuple[int, float]]] = {}

    def add(self, step: int, value: float) -> None:
        """Adds a value; ignores one that is not finite."""
        if not math.isfinite(value):
            return
        self._put(step, (step, value), (step, value))
        while len(self._buckets) > self._limit:
            old, self._buckets = self._buckets, {}
            self._width *= 2
            for low, high in old.values():
                self._put(low[0], low, low)
                self._put(high[0], high, high)

    def _put(self, step: int, low: tuple[int, float], high: tuple[int, float]) -> None:
        key = step // self._width
        if key in self._buckets:
            old_low, old_high = self._buckets[key]
            low = min(old_low, low, key=lambda point: point[1])
            high = max(old_high, high, key=lambda point: point[1])
        self._buckets[key] = (low, high)

    def points(self) -> tuple[tuple[int, float], ...]:
        """The (step, value) pairs, ordered by step."""
        return tuple(
            point
            for key in sorted(self._buckets)
            for point in sorted(set(self._buckets[key]), key=lambda pair: pair[0])
        )


class Smoothed:
    """A moving average over about the last quarter of the values, or the last ten if these are fewer.

    A fixed number would make the average of a short run lag behind by most of what the run learned.

    Attributes:
        value: The average, or None before the first value.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self._count = 0

    def add(self, value: float) -> None:
        """Adds a value; ignores one that is not finite."""
        if math.isfinite(value):
            self._count += 1
            share = max(0.1, 4 / (self._count + 3))
            self.value = value if self.value is None else (1 - share) * self.value + share * value


class Record:
    """The numbers of one run.

    Losses and token counts may be tensors on a device; they are converted to numbers together, in
    ``collect``, which is the only place that waits for the device.
    """

    def __init__(self) -> None:
        self.step = 0
        self.first_step = 0
        """Steps done before a resumed run."""
        self.epoch: float | None = None
        self.learning_rate: float | None = None
        self.loss: float | None = None
        self.done_tokens = 0.0
        """Input tokens of the steps that are done."""
        self._begun_tokens = 0.0
        self.gradient_norm: float | None = None
        self.evaluated: tuple[int, float] | None = None
        self.metrics: dict[str, float] = {}
        self.best: tuple[int, float] | None = None
        """Step and score of the best evaluation; a lower score is better."""
        self.smoothed = Smoothed()
        self.history = History()
        self.eval_history = History()
        self.series: dict[str, History] = {}
        self.metric_history: dict[str, History] = {}
        self.rise: tuple[float, tuple[int, float]] | None = None
        """The highest loss before a rise, and step and value of the second one in a row that is far above it."""
        self._highest: float | None = None
        self._was_high = False
        self._loss_total, self._loss_count = 0.0, 0
        self._pending: list[tuple[int, Number]] = []
        self._pending_values: list[tuple[str, int, Number]] = []
        self._pending_done: Number = 0
        self._pending_begun: Number = 0
        self._marks: deque[tuple[float, int, float]] = deque(maxlen=60)

    def resume(self, step: int, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """Continues counting from a step of an earlier run.

        Args:
            step: the last step done.
            earlier: what was logged until then, in the form of a Trainer's ``log_history``.
        """
        self.step = self.first_step = step
        for entry in earlier:
            if isinstance(entry.get("loss"), int | float):
                self.add(int(entry["step"]), entry["loss"], entry.get("learning_rate"), None, entry.get("epoch"))
            if isinstance(entry.get("eval_loss"), int | float):
                self.add_evaluation(int(entry["step"]), entry["eval_loss"], {})
        self.forget_pace()

    def add(
        self,
        step: int,
        loss: Number | None,
        learning_rate: float | None,
        tokens: Number | None,
        epoch: float | None,
        gradient_norm: Number | None = None,
        metrics: Mapping[str, Number] | None = None,
    ) -> bool:
        """Records what is known about a step.

        Args:
            step: the step.
            loss: its loss, or None.
            learning_rate: its learning rate, or None.
            tokens: input tokens to add to the count, or None.
            epoch: epochs done, or None.
            gradient_norm: the norm of its gradients, or None.
            metrics: further values of it, by name, or None.

        Returns:
            Whether it is a new step.
        """
        advanced, self.step = step > self.step, max(step, self.step)
        if loss is not None:
            self._pending.append((step, _detached(loss)))
        if tokens is not None:
            self._pending_begun = self._pending_begun + _detached(tokens)
        if advanced:  # the tokens so far are those of steps that are done
            self._pending_done, self._pending_begun = self._pending_done + self._pending_begun, 0
            self.done_tokens, self._begun_tokens = self.done_tokens + self._begun_tokens, 0.0
        self.epoch = self.epoch if epoch is None else epoch
        if learning_rate is not None:
            self.learning_rate = learning_rate
            self.trace("learning rate", learning_rate, step)
        values = {**({} if gradient_norm is None else {GRADIENT_NORM: gradient_norm}), **(metrics or {})}
        self._pending_values += [(name, step, _detached(value)) for name, value in values.items()]
        return advanced

    def add_evaluation(
        self, step: int, loss: float | None, metrics: Mapping[str, float], score: float | None = None
    ) -> None:
        """Records an evaluation.

        Args:
            step: the step at which it was made.
            loss: the loss on the evaluation data, or None.
            metrics: further metrics, by name.
            score: the score by which the best evaluation is found, lower is better; the loss by default.
        """
        if loss is not None:
            self.evaluated = (step, loss)
            self.eval_history.add(step, loss)
        self.metrics |= metrics
        for name, value in metrics.items():
            self.metric_history.setdefault(name, History(_SMALL)).add(step, value)
        score = loss if score is None else score
        if score is not None and is_better(score, self.best[1] if self.best else None):
            self.best = (step, score)

    def take_over(self, curves: Mapping[str, Curve]) -> None:
        """Adds curves and metrics that were measured in an earlier process."""
        for name, points in curves.items():
            histories = self.metric_history if is_measured(name) else self.series
            for step, value in points:
                histories.setdefault(name, History(_SMALL)).add(step, value)

    def trace(self, name: str, value: float, step: int | None = None) -> None:
        """Adds a value to a curve.

        Args:
            name: the curve.
            value: the value.
            step: its step; the current one by default.
        """
        self.series.setdefault(name, History(_SMALL)).add(self.step if step is None else step, value)

    @property
    def token_count(self) -> float:
        """The number of input tokens, with those of a step that is not done yet."""
        return self.done_tokens + self._begun_tokens

    @property
    def mean_loss(self) -> float | None:
        """The mean of all finite losses of the run; None before the first one."""
        return self._loss_total / self._loss_count if self._loss_count else None

    @property
    def on_host(self) -> bool:
        """Whether ``collect`` would not have to wait for a device."""
        values = [
            self._pending_done,
            self._pending_begun,
            *(value for *_, value in (*self._pending, *self._pending_values)),
        ]
        return not any(isinstance(value, Tensor) and value.device.type != "cpu" for value in values)

    def collect(self) -> int | None:
        """Converts pending tensors to numbers; returns the first new step whose loss is NaN, or None."""
        pending, self._pending = self._pending, []
        first_nan = None
        for (step, _), value in zip(pending, _numbers([loss for _, loss in pending]), strict=True):
            self.loss = value
            self.smoothed.add(value)
            self.history.add(step, value)
            if math.isfinite(value):
                self._loss_total, self._loss_count = self._loss_total + value, self._loss_count + 1
                self._note_rise(step, value)
            if first_nan is None and value != value:
                first_nan = step
        values, self._pending_values = self._pending_values, []
        for (name, step, _), value in zip(values, _numbers([item for *_, item in values]), strict=True):
            if name == GRADIENT_NORM:
                self.gradient_norm = value
                self.trace(name, value, step)
            else:
                self.add_evaluation(step, None, {name: value})
        done, begun = _numbers([self._pending_done, self._pending_begun])
        self.done_tokens, self._begun_tokens = self.done_tokens + done, self._begun_tokens + begun
        self._pending_done = self._pending_begun = 0
        return first_nan

    def _note_rise(self, step: int, value: float) -> None:
        """Compares a loss with those before; a single outlier, e.g. of a small batch, is no rise."""
        before = value if self._highest is None else self._highest
        high = before <= _LARGEST_ENTROPY and value > max(_HIGH_LOSS, before + _RISE, _GROWTH * before)
        if high and self._was_high and self.rise is None:
            self.rise = (before, (step, value))
        self._was_high = high
        self._highest = before if high else max(before, value)

    def mark(self, elapsed: float) -> None:
        """Stores the current progress, from which ``pace`` is computed, if a step was done since the last time.

        Args:
            elapsed: seconds since the start, without pauses.
        """
        if not self._marks or self.step > self._marks[-1][1]:
            self._marks.append((elapsed, self.step, self.done_tokens))

    def forget_pace(self) -> None:
        """Clears the stored progress, e.g. after a pause, so that earlier steps do not affect the pace."""
        self._marks.clear()

    def pace(self, elapsed: float, *, overall: bool) -> tuple[float | None, float | None]:
        """The speed of the run.

        Args:
            elapsed: seconds since the start, without pauses.
            overall: whether to measure over the whole run, instead of the last 60 publications.

        Returns:
            Seconds per step and tokens per second; None if unknown.
        """
        if not overall and not self._marks:
            return None, None
        first = (0.0, self.first_step, 0.0) if overall else self._marks[0]
        last = (elapsed, self.step, self.token_count if overall else self.done_tokens)
        if not overall and self._marks[-1][1] == self.step:  # the time of a step that is not done does not count
            last = self._marks[-1]
        seconds, steps, tokens = (end - start for start, end in zip(first, last, strict=True))
        return (seconds / steps if steps else None, tokens / seconds if seconds and tokens else None)


def _detached(value: Number) -> Number:
    return value.detach() if isinstance(value, Tensor) else float(value)


def _numbers(values: list[Number]) -> list[float]:
    """Values as floats, with one transfer for all tensors of a device."""
    tensors = [value.reshape(()).float() for value in values if isinstance(value, Tensor)]
    if len({tensor.device for tensor in tensors}) == 1:
        moved = iter(torch.stack(tensors).tolist())
        return [next(moved) if isinstance(value, Tensor) else float(value) for value in values]
    return [float(value) for value in values]
