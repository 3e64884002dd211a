"""The adapters of a sweep and how each of them does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from nbpeft._util.interrupts import HeldInterrupts
from nbpeft.display import numbers
from nbpeft.engine.changes.active_state import ActiveAdapters, Call
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.state import ENDED, MemberState, MemberStatus, TrainStatus
from nbpeft.sweeps import MOST, check_own, members_together, names_of
from nbpeft.training.adapters.learning_check import have_exploded
from nbpeft.training.adapters.snapshot import copied, write_back
from nbpeft.training.monitor.callback import shape_of
from nbpeft.training.monitor.control import CloneRequest
from nbpeft.training.monitor.record import Record
from nbpeft.training.transformers.arguments import changed_arguments


class Member:
    """One adapter that learns beside others.

    Args:
        name: of the adapter.
        fields: what it has of its own: fields of ``TrainingArguments``.
        settings: what distinguishes it from the others, its config included.
        parameters: those of the adapter that train.

    Attributes:
        arguments: its ``TrainingArguments``; set before training starts.
        status: whether it learns, or why not.
        settings: ``settings`` in words.
        learning_rate: of the step that runs.
        good_step: step of the weights that are kept; None without any.
    """

    arguments: TrainingArguments

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
        self._exploded, self._watches_weights = False, not have_exploded(self.parameters)

    def clip(self) -> Tensor | None:
        """Clips its gradients as its arguments say. Returns their norm before that, or None where it has none."""
        most = self.arguments.max_grad_norm
        if most and most > 0 and self.status == "training":
            self._norm = torch.nn.utils.clip_grad_norm_(self.parameters, most)
            return self._norm
        return None

    def measure_norm(self) -> Tensor:
        """The norm of its gradients, which stay as they are."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm: Tensor = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        self._norm = norm
        return norm

    def add_loss(self, loss: Tensor) -> None:
        """Adds the loss of a batch to that of the step."""
        self._loss = loss if self._loss is None else self._loss + loss

    def end_step(self, step: int) -> None:
        """Notes the step."""
        if self._loss is not None:
            self._record.add(step, self._loss, self.learning_rate, None, None, self._norm)
            self._broken = ~self._loss.isfinite()
        self._loss = self._norm = None

    def has_diverged(self, *, weights: bool) -> bool:
        """Whether the loss of the last step is not finite or, where ``weights`` asks for it, they have exploded."""
        lost = self._exploded or (self._broken is not None and bool(self._broken))
        return lost or (weights and self._watches_weights and have_exploded(self.parameters))

    def keep(self, step: int) -> None:
        """Copies its weights to host memory, unless they have exploded or the loss of the step that runs is not finite.

        Args:
            step: optimizer steps done.
        """
        self._exploded = self._watches_weights and have_exploded(self.parameters)
        if not self._exploded and (self._loss is None or bool(self._loss.isfinite())):
            with HeldInterrupts():
                self._good = copied(self._numbered, self._good)
                self.good_step = step

    def put_back(self) -> int | None:
        """Writes the weights that were kept last into it. Returns their step, or None without any."""
        write_back(self._good, self._numbered)
        return self.good_step

    @property
    def _numbered(self) -> dict[str, nn.Parameter]:
        return {str(number): parameter for number, parameter in enumerate(self.parameters)}

    def evaluated(self, step: int, loss: float | None) -> None:
        """Notes what was measured on held-out rows."""
        if loss is not None:
            self._record.add_evaluation(step, loss, {})

    def state(self, run: TrainStatus) -> MemberState:
        """How it does now, in a run of that status."""
        record = self._record
        record.collect()
        ended: MemberStatus = "finished" if run == "finished" else "stopped"
        return MemberState(
            name=self.name,
            status=ended if self.status == "training" and run in ENDED else self.status,
            step=record.step,
            settings=dict(self.settings),
            loss=record.loss,
            smoothed_loss=record.smoothed.value,
            eval_loss=record.evaluated[1] if record.evaluated else None,
            eval_step=record.evaluated[0] if record.evaluated else None,
            learning_rate=self.learning_rate,
            gradient_norm=record.gradient_norm,
            history=record.history.points(),
            eval_history=record.eval_history.points(),
        )


class SideBySide:
    """Adapters that learn side by side, and which of them a pass over the model serves.

    Args:
        model: with the adapters.
        members: one for each adapter.

    Attributes:
        mixed: whether one pass may serve several; set to False where a model's loss cannot be taken apart.
        note: said once with the run.
        learned: whether a step was done.
        join: gives a new member the optimizer's state of another one, and the schedule that its arguments say.
        opened: contexts in which the adapters learn, until training ends.
    """

    join: Callable[[Member, Member], None]

    def __init__(self, model: Any, members: Sequence[Member]) -> None:
        self._manager: AdapterManager = require_manager(model)
        self.members = tuple(members)
        self.mixed, self.learned = True, False
        self.note: Callable[[str], None] = lambda message: None
        self.opened = ExitStack()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters."""
        return tuple(member.name for member in self.members)

    @property
    def training(self) -> list[Member]:
        """Those that still learn."""
        return [member for member in self.members if member.status == "training"]

    @property
    def best(self) -> str:
        """The one that learned best; see ``MemberState.rank``."""
        return min(self.states("finished"), key=lambda member: member.rank).name

    def fields(self) -> dict[str, dict[str, Any]]:
        """What each has of its own, for a record of the run."""
        return {member.name: member.fields for member in self.members}

    def states(self, run: TrainStatus) -> tuple[MemberState, ...]:
        """How each does now, in a run of that status."""
        return tuple(member.state(run) for member in self.members)

    def alone(self, member: Member) -> Call:
        """A context for calls of the model in which one adapter serves all rows."""
        return self._manager.active_state.call(ActiveAdapters((member.name,), (self._manager.scale(member.name),)))

    def stop(self, name: str, status: MemberStatus = "stopped") -> None:
        """Takes an adapter's rows out of the batch from the next step on; it keeps what it learned."""
        for member in self.training:
            if member.name == name:
                member.status = status

    def clone(self, request: CloneRequest) -> Member:
        """Lets an adapter go on as two: the new one has its weights and its optimizer's state, and learns on beside it.

        Args:
            request: which, and what the new one has of its own.

        Raises:
            ConfigError: a field cannot be an adapter's own, or has a value that is impossible.
            AdapterError: the adapter does not learn, or the name is taken.
        """
        source = next((member for member in self.training if member.name == request.source), None)
        if source is None:
            learning = ", ".join(member.name for member in self.training)
            raise AdapterError(f"{request.source!r:.60} does not learn beside others; {learning} do")
        if len(self.members) >= MOST:
            raise ConfigError(f"{len(self.members)} adapters are trained side by side already, and {MOST} is the most")
        changed = dict(request.fields)
        if request.rate_factor != 1.0:
            changed["learning_rate"] = source.arguments.learning_rate * request.rate_factor
        check_own(changed)
        arguments = changed_arguments(source.arguments, changed)
        name = request.name or self._free_name(source, changed)
        check_name(name)
        with self._manager.transaction():
            self._manager.copy(source.name, name)
            self._manager.unfreeze(name)
            clone = Member(
                name, {**source.fields, **changed}, {**source.settings, **changed}, self._manager.parameters(name)
            )
            clone.arguments = arguments
            self.join(clone, source)
        for member in self.members:
            for field in changed:
                member.settings.setdefault(field, setting_text(getattr(member.arguments, field)))
        self.members += (clone,)
        self.opened.enter_context(self._manager.use(self.names, independent=True))
        return clone

    def _free_name(self, source: Member, changed: Mapping[str, Any]) -> str:
        """``codes-lr1e-4-lr5e-5``, or with a number where that is taken."""
        (name,) = names_of(source.name, [changed])
        numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        return next(free for free in numbered if free not in self._manager.names)

    def passes(self, inputs: Mapping[str, Any]) -> list[list[Member]]:
        """Who is served in one pass over the model, for a batch of one of them."""
        members, shape = self.training, shape_of(inputs)
        width = 1
        if self.mixed and shape is not None and _in_rows(inputs, shape[0]):
            on_cpu = all(value.device.type == "cpu" for value in inputs.values())
            width = members_together(len(members), shape[0] * shape[1], on_cpu=on_cpu)
        return [members[start : start + width] for start in range(0, len(members), width)]


def kept_of(members: object) -> dict[str, Any]:
    """What the record of a run keeps of the members of a sweep, so that it can go on; nothing where it is none."""
    return {"members": members.fields()} if isinstance(members, SideBySide) else {}


def _in_rows(inputs: Mapping[str, Any], rows: int) -> bool:
    """Whether everything in a batch belongs to its rows, one for one, so that rows can be repeated."""
    return all(isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows for value in inputs.values())


def setting_text(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return numbers.learning_rate(value)
    plain = getattr(value, "value", value)
    return ", ".join(sorted(map(str, plain))) if isinstance(plain, list | tuple | set) else str(plain)
