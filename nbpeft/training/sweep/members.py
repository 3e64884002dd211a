"""The adapters of a sweep and their progress."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.display import numbers
from nbpeft.engine.changes.active_state import ActiveAdapters, Call
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.state import ENDED, Curve, MemberState, MemberStatus, TrainStatus
from nbpeft.sweeps import MOST, check_own, members_together, names_of
from nbpeft.training.adapters.learning_check import have_exploded
from nbpeft.training.adapters.snapshot import copied, write_back
from nbpeft.training.monitor.callback import metrics_of, shape_of
from nbpeft.training.monitor.control import CloneRequest
from nbpeft.training.monitor.record import Record, score_of
from nbpeft.training.objectives.objective import Objective
from nbpeft.training.sweep.rows import OwnRows, draw_apart
from nbpeft.training.transformers.arguments import changed_arguments


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of one adapter.

    Attributes:
        step: the optimizer step.
        score: the score by which the best evaluation is found, lower is better.
        loss: the loss on the evaluation rows, or None.
        metrics: further metrics, by name.
        weights: a copy of the weights; empty if they were not kept.
    """

    step: int
    score: float
    loss: float | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Member:
    """An adapter that is trained side by side with others.

    Args:
        name: name of the adapter.
        fields: its own fields of ``TrainingArguments`` and of the objective.
        settings: what distinguishes it from the others, including config fields.
        parameters: its trainable parameters.

    Attributes:
        arguments: its ``TrainingArguments``; set before training starts.
        objective: what it minimizes; set before training starts.
        status: whether it is trained, or why not.
        settings: ``settings`` as text.
        learning_rate: learning rate of the current step.
        good_step: step of the last good weights; None if there are none.
        restored_step: step of the weights that ``restore`` restored; None if it was not called or there are none.
        best: its best evaluation, with a copy of the weights, if they are kept; else None.
        rows: its own batches and random numbers; None if those of all are the same.
        comparable: whether all are trained on the same rows.
    """

    arguments: TrainingArguments
    objective: Objective
    rows: OwnRows | None = None
    comparable: bool = True

    def __init__(
        self, name: str, fields: Mapping[str, Any], settings: Mapping[str, Any], parameters: Sequence[nn.Parameter]
    ) -> None:
        self.name, self.fields, self.parameters = name, dict(fields), list(parameters)
        self.status: MemberStatus = "training"
        self.learning_rate: float | None = None
        self.settings = {field: setting_text(value) for field, value in settings.items()}
        self._record = Record()
        self._loss: Tensor | None = None
        self._norm: Tensor | None = None
        self._broken: Tensor | None = None
        self._good: dict[str, Tensor] = {}
        self.good_step: int | None = None
        self.restored_step: int | None = None
        self.best: Evaluation | None = None
        self._last: Evaluation | None = None
        self._news: Evaluation | None = None
        self._exploded, self._watches_weights = False, not have_exploded(self.parameters)

    def clip(self) -> Tensor | None:
        """Clips its gradients by ``max_grad_norm``; returns their norm before that, or None without clipping."""
        most = self.arguments.max_grad_norm
        if most and most > 0 and self.status == "training":
            self._norm = torch.nn.utils.clip_grad_norm_(self.parameters, most)
            return self._norm
        return None

    def measure_norm(self) -> Tensor:
        """Returns the norm of its gradients, which are not changed."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm: Tensor = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        self._norm = norm
        return norm

    def add_loss(self, loss: Tensor) -> None:
        """Adds the loss of a batch to that of the step."""
        self._loss = loss if self._loss is None else self._loss + loss

    @property
    def steps(self) -> int | None:
        """The number of its optimizer steps; None if it is that of the training."""
        return None if self.rows is None else self.rows.steps

    def end_step(self, step: int) -> None:
        """Records the step."""
        if self.rows is not None:
            self.rows.end_step()
        if self._loss is not None:
            self._record.add(step, self._loss, self.learning_rate, None, None, self._norm)
            self._broken = ~self._loss.isfinite()
        self._loss = self._norm = None

    @property
    def losses(self) -> Curve:
        """The loss of each step so far, reduced as for a chart."""
        self._record.collect()
        return self._record.history.points()

    def take_over(self, losses: Curve) -> None:
        """Adds the losses of the steps before a resumed run."""
        for step, loss in losses:
            self._record.add(step, loss, None, None, None)

    def has_diverged(self, *, weights: bool) -> bool:
        """Returns whether the loss of the last step is not finite or, if ``weights`` is set, its weights exploded."""
        lost = self._exploded or (self._broken is not None and bool(self._broken))
        return lost or (weights and self._watches_weights and have_exploded(self.parameters))

    def keep(self, step: int) -> None:
        """Copies its weights to host memory, unless they exploded or the loss of the current step is not finite."""
        self._exploded = self._watches_weights and have_exploded(self.parameters)
        if not self._exploded and (self._loss is None or bool(self._loss.isfinite())):
            with DeferredInterrupts():
                self._good = copied(self.numbered, self._good)
                self.good_step = step

    def restore(self) -> int | None:
        """Restores the weights of the best evaluation, or else the last good ones.

        Returns:
            Their step; None if no weights are kept.
        """
        if self.best is not None:
            write_back(self.best.weights, self.numbered)
            self._last, self.restored_step = self.best, self.best.step
        else:
            write_back(self._good, self.numbered)
            self.restored_step = self.good_step
        return self.restored_step

    @property
    def numbered(self) -> dict[str, nn.Parameter]:
        """Its parameters by their number, as text."""
        return {str(number): parameter for number, parameter in enumerate(self.parameters)}

    def evaluated(self, step: int, args: TrainingArguments, reported: Mapping[str, Any]) -> None:
        """Records an evaluation.

        Args:
            step: the optimizer step.
            args: the arguments of the training, which say by what metric the best adapter is found.
            reported: the metrics, as a Trainer reports them.
        """
        loss, metrics, score = reported.get("eval_loss"), metrics_of(reported), score_of(args, reported)
        deciding = math.nan if score is None and args.metric_for_best_model else score
        self._record.add_evaluation(step, loss, metrics, deciding)
        if score is not None:
            self._news = self._last = Evaluation(step, score, loss, metrics)

    @property
    def evaluated_step(self) -> int | None:
        """The step of its last evaluation by the deciding metric; None if there is none."""
        return None if self._last is None else self._last.step

    def take_news(self) -> Evaluation | None:
        """Returns an evaluation that was not returned before; None if there is none."""
        news, self._news = self._news, None
        return news

    def keep_best(self, best: Evaluation, weights: dict[str, Tensor] | None = None) -> None:
        """Keeps the weights of its best evaluation: those given, or else its current ones."""
        with DeferredInterrupts():
            before = {} if self.best is None else self.best.weights
            self.best = replace(best, weights=copied(self.numbered, before) if weights is None else weights)

    @property
    def is_at_best(self) -> bool:
        """Whether its weights are those of its best evaluation, or no such weights are kept."""
        return self.best is None or self._last is self.best or self._record.step == self.best.step

    def state(self, run: TrainStatus, metric: str = "") -> MemberState:
        """Returns its current state.

        Args:
            run: the status of the run.
            metric: the name of the metric by which the best adapter is found; empty for the loss.
        """
        record, last = self._record, self._last
        record.collect()
        evaluated = record.evaluated
        if last is not None and last is self.best and last.loss is not None:  # its weights are those of that step
            evaluated = (last.step, last.loss)
        ended: MemberStatus = "finished" if run == "finished" else "stopped"
        return MemberState(
            name=self.name,
            status=ended if self.status == "training" and run in ENDED else self.status,
            step=record.step,
            settings=dict(self.settings),
            loss=record.loss,
            smoothed_loss=record.smoothed.value,
            eval_loss=evaluated[1] if evaluated else None,
            eval_step=evaluated[0] if evaluated else None,
            learning_rate=self.learning_rate,
            gradient_norm=record.gradient_norm,
            history=record.history.points(),
            eval_history=record.eval_history.points(),
            metrics=dict(record.metrics if last is None else {**record.metrics, **last.metrics}),
            metric_history={name: curve.points() for name, curve in record.metric_history.items()},
            metric=metric,
            score=None if last is None else last.score,
            best_step=None if record.best is None else record.best[0],
            comparable=self.comparable,
            restored_step=self.restored_step,
        )


class SideBySide:
    """Adapters that are trained side by side, and how a batch is distributed to passes over the model.

    Args:
        model: the model with the adapters.
        members: one per adapter.
        start: how the adapters start, for the user; empty for adapters that the model had.

    Attributes:
        mixed: whether one pass may serve several adapters; False if a model's loss cannot be split by rows.
        note: adds a note to the run.
        learned: whether a step was done.
        join: copies the optimizer state of a member to a new one, which gets its own schedule.
        opened: contexts that are open until training ends.
        evaluated: the members of the next evaluation; empty for all that are trained.
        metric: name of the metric by which the best adapter is found; empty for the loss.
    """

    join: Callable[[Member, Member], None]

    def __init__(self, model: Any, members: Sequence[Member], start: str = "") -> None:
        self._manager: AdapterManager = require_manager(model)
        self.members, self.start = tuple(members), start
        self.mixed, self.learned = True, False
        self.note: Callable[[str], None] = lambda message: None
        self.opened = ExitStack()
        self.metric = ""
        self.evaluated: list[Member] = []

    def take_rows(self, train: Any, evaluation: Any) -> tuple[Any, Any]:
        """Gives each member its own rows, or the same ones if it draws other random numbers than the others.

        Returns:
            The training rows and the evaluation rows of the first member.
        """
        own = isinstance(train, Mapping)
        apart = hasattr(train, "__len__") and draw_apart([self._manager.configs[name] for name in self.names])
        for member in self.members if own or apart else ():
            rows = [part[member.name] if own and part is not None else part for part in (train, evaluation)]
            member.rows, member.comparable = OwnRows(*rows), not own
        first = self.members[0].rows
        return (train, evaluation) if first is None else (first.train, first.evaluation)

    @property
    def has_own_batches(self) -> bool:
        """Whether each member has its own batches and random numbers."""
        return any(member.rows is not None for member in self.members)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters."""
        return tuple(member.name for member in self.members)

    @property
    def training(self) -> list[Member]:
        """The members that are still trained."""
        return [member for member in self.members if member.status == "training"]

    def best(self, selected: Sequence[str]) -> str:
        """Returns the name of the best adapter; see ``MemberState.rank``.

        Args:
            selected: the adapters that were active before, of which one stays active if the members had their own rows.
        """
        if not self.members[0].comparable:
            return next((name for name in selected if name in self.names), self.names[0])
        return min(self.states("finished"), key=lambda member: member.rank).name

    def unfinished(self, step: int) -> list[Member]:
        """Returns the members that are still trained after a step."""
        return [member for member in self.training if member.steps is None or member.steps > step]

    def finish(self, step: int) -> None:
        """Ends the training of the members that have done all of their steps."""
        for member in self.training:
            if member.steps is not None and member.steps <= step:
                member.status = "finished"

    def fields(self) -> dict[str, dict[str, Any]]:
        """Returns the own fields of each member, for a record of the run."""
        return {member.name: member.fields for member in self.members}

    def states(self, run: TrainStatus) -> tuple[MemberState, ...]:
        """Returns the current state of each member, in a run with that status."""
        return tuple(member.state(run, self.metric) for member in self.members)

    def alone(self, member: Member) -> Call:
        """Returns a context manager for calls of the model in which one adapter serves all rows."""
        return self._manager.active_state.call(ActiveAdapters((member.name,), (self._manager.scale(member.name),)))

    def stop(self, name: str, status: MemberStatus = "stopped") -> None:
        """Ends the training of an adapter after the current step; it keeps what it learned."""
        for member in self.training:
            if member.name == name:
                member.status = status

    def clone(self, request: CloneRequest) -> Member:
        """Duplicates an adapter: the copy has its weights and optimizer state, and is trained side by side with it.

        Raises:
            ConfigError: a field cannot be set per adapter, or its value is invalid.
            AdapterError: the adapter is not being trained, or the name is taken.
        """
        source = self._source(request.source)
        if len(self.members) >= MOST:
            raise ConfigError(f"{len(self.members)} adapters are trained side by side already; the limit is {MOST}")
        changed = dict(request.fields)
        if request.rate_factor != 1.0:
            changed["learning_rate"] = source.arguments.learning_rate * request.rate_factor
        arguments, objective = self._changed(source, changed)
        name = request.name or self._free_name(source, changed)
        check_name(name)
        with self._manager.transaction():
            self._manager.copy(source.name, name)
            self._manager.unfreeze(name)
            clone = Member(
                name, {**source.fields, **changed}, {**source.settings, **changed}, self._manager.parameters(name)
            )
            clone.arguments, clone.objective = arguments, objective
            clone.rows, clone.comparable = None if source.rows is None else source.rows.copied(), source.comparable
            self.join(clone, source)
        self.members += (clone,)
        self.name_settings(changed)
        self.opened.enter_context(self._manager.use(self.names, independent=True))
        return clone

    def name_settings(self, fields: Iterable[str]) -> None:
        """Adds fields in which members differ to the settings of those that have their common value."""
        for member in self.members:
            for field in fields:
                owner = member.objective if field in member.objective.own_fields() else member.arguments
                member.settings.setdefault(field, setting_text(getattr(owner, field)))

    def check_clone(self, name: str, fields: Mapping[str, Any]) -> None:
        """Refuses to duplicate an adapter with fields that cannot differ, or with invalid values.

        Raises:
            ConfigError: a field cannot be set per adapter, or its value is invalid.
            AdapterError: the adapter is not being trained.
        """
        self._changed(self._source(name), fields)

    def _source(self, name: str) -> Member:
        """Returns the member to duplicate."""
        for member in self.training:
            if member.name == name:
                return member
        learning = ", ".join(member.name for member in self.training)
        raise AdapterError(f"{name!r:.60} is not being trained in this sweep; these are: {learning}")

    def _changed(self, source: Member, fields: Mapping[str, Any]) -> tuple[TrainingArguments, Objective]:
        """Returns the arguments and the objective of a member with other values for some fields."""
        of_objective = source.objective.own_fields()
        check_own(fields, of_objective)
        own = {name: value for name, value in fields.items() if name in of_objective}
        rest = {name: value for name, value in fields.items() if name not in own}
        return changed_arguments(source.arguments, rest), replace(source.objective, **own)

    def _free_name(self, source: Member, changed: Mapping[str, Any]) -> str:
        """Returns a name such as ``codes-lr1e-4-lr5e-5``, with a number appended if it is taken."""
        (name,) = names_of(source.name, [changed])
        numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        return next(free for free in numbered if free not in self._manager.names)

    def passes(self, inputs: Mapping[str, Any]) -> list[list[Member]]:
        """Returns the members of each pass over the model, for a batch of one member."""
        members, shape = self.training, shape_of(inputs)
        width = 1
        if self.mixed and shape is not None and _in_rows(inputs, shape[0]):
            on_cpu = all(value.device.type == "cpu" for value in inputs.values())
            width = members_together(len(members), shape[0] * shape[1], on_cpu=on_cpu)
        return [members[start : start + width] for start in range(0, len(members), width)]


def kept_of(members: object) -> dict[str, Any]:
    """Returns what the record of a run stores about a sweep, so that it can be resumed; empty for other runs."""
    return {"members": members.fields()} if isinstance(members, SideBySide) else {}


def _in_rows(inputs: Mapping[str, Any], rows: int) -> bool:
    """Returns whether every tensor of a batch has one entry per row, so that rows can be repeated."""
    return all(isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows for value in inputs.values())


def setting_text(value: Any) -> str:
    """Returns a setting as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return numbers.setting(value)
    plain = getattr(value, "value", value)
    return ", ".join(sorted(map(str, plain))) if isinstance(plain, list | tuple | set) else str(plain)
