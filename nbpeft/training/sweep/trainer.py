"""One Trainer for several adapters: each has its rows, loss, clipping, schedule and evaluation as if trained alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft.engine.changes.random_numbers import drawing_from, random_state, set_random_state
from nbpeft.errors import ConfigError, NbpeftError, TrainingError
from nbpeft.model.handle.serving import serving_rows
from nbpeft.runs.record import checked_points
from nbpeft.training.adapters.adapted_model import base_of
from nbpeft.training.adapters.extra_loss import loss_divisor
from nbpeft.training.disk.kept_arguments import is_plain_value
from nbpeft.training.monitor.callback import metrics_of
from nbpeft.training.monitor.control import CloneRequest
from nbpeft.training.monitor.record import score_of
from nbpeft.training.monitor.run import Run
from nbpeft.training.sweep.loss import NotSplittableError, SplitLoss, split_loss
from nbpeft.training.sweep.members import Member, SideBySide
from nbpeft.training.sweep.rows import OwnRows, batches_from, steps_of_epoch
from nbpeft.training.transformers.trainer import has_own_loss
from nbpeft.training.watching.divergence import Throttle
from nbpeft.training.watching.scoring import named_metrics

_GROUP_OPTIONS = ("lr", "betas", "eps")
"""Optimizer options that are set per parameter group."""
_RANDOM = "rng_state.members"
"""The folder in a checkpoint with the random numbers of members with their own rows; no adapter can have this name."""
_OWN_PARAMETERS = ("params", "model", "optimizer_dict")
"""Options with which an optimizer of transformers selects its parameters itself."""


_ENDS = ("finished", "stopped", "diverged")
"""How the training of a member may have ended."""
_REFUSED = {
    "fp16": "one gradient scaler would skip the steps of all adapters; use bf16",
    "load_best_model_at_end": "the best adapter is active at the end, and each has its last weights",
    "optimizers": "each adapter has its own; select it with optim=…",
    "optimizer_cls_and_kwargs": "each adapter has its own; select it with optim=…",
    "sample": "compare the adapters after the training",
}
"""Arguments that would affect all adapters together, with the reason or an alternative."""


class SideBySideTrainer(transformers.Trainer):
    """Trains the members of ``group``; ``trainer_for`` derives a subclass from a given Trainer class."""

    group: ClassVar[SideBySide]
    given_class: ClassVar[type[Any]]
    _split: SplitLoss | None = None
    _evaluated: Member | None = None
    _split_checked = False
    epochs_done: int | None = None
    """Complete epochs of the member with its own rows whose next epoch begins; None without own rows."""
    _own_step: Mapping[Member, tuple[list[Any], Any]] = MappingProxyType({})
    """The batches of the current step, until they are computed."""

    # Batches of members with their own rows

    def get_train_dataloader(self) -> Any:
        """Returns the batches; if members have their own, as many numbers as the longest has batches."""
        if not self.group.has_own_batches:
            return super().get_train_dataloader()
        start, size, most = random_state(), self.args.gradient_accumulation_steps, 0
        for name, rows in self._own_rows:
            set_random_state(start)
            loader = self._loader_of(rows)
            if not len(loader):
                raise TrainingError(f"the rows of {name!r} do not fill a batch: remove dataloader_drop_last")
            epochs = math.ceil(self.args.num_train_epochs * steps_of_epoch(loader, size))
            rows.begin(loader, self.args.max_steps if self.args.max_steps > 0 else epochs)
            most = max(most, len(loader))
        return DataLoader(range(most), batch_size=1, collate_fn=list)  # type: ignore[arg-type]

    @property
    def _own_rows(self) -> list[tuple[str, OwnRows]]:
        return [(member.name, member.rows) for member in self.group.members if member.rows is not None]

    def _loader_of(self, rows: OwnRows) -> Any:
        former, self.train_dataset = self.train_dataset, rows.train
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = former

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any) -> Any:
        """Returns the batches of a step; those of members with their own rows are kept for the step."""
        found = super().get_batch_samples(epoch_iterator, num_batches, *args)
        if not self.group.has_own_batches:
            return found
        self.group.finish(self.state.global_step)
        take, size = super().get_batch_samples, self.args.gradient_accumulation_steps

        def batches(rows: OwnRows) -> Iterator[tuple[list[Any], Any]]:
            loader = self._loader_of(rows) if rows.loader is None else rows.loader
            step = self.state.global_step
            return batches_from(loader, step, size, lambda source, most: take(source, most, *args), self._begin_epoch)

        self._own_step = {
            member: member.rows.next_step(batches) for member in self.group.training if member.rows is not None
        }
        shown: list[Any] = next(iter(self._own_step.values()), ([{}], None))[0]  # the Trainer counts their tokens
        return [shown[min(place, len(shown) - 1)] for place in range(len(found[0]))], None

    def _begin_epoch(self, epoch: int) -> None:
        self.epochs_done = epoch

    def _steps_on_own_rows(self, model: nn.Module) -> Tensor:
        """Computes forward and backward for all batches of each member's step; returns the mean of their losses."""
        own, self._own_step = self._own_step, MappingProxyType({})  # all in the first call of a step
        losses = [torch.zeros((), device=self.args.device)] if not own else []
        for member, (batches, num_items) in own.items():
            assert member.rows is not None
            self.current_gradient_accumulation_steps = len(batches)
            with member.rows.drawing():
                parts = [self._one_pass(model, dict(inputs), [member], num_items) for inputs in batches]
            losses.append(torch.stack([loss for part in parts for loss in part]).sum())
        return torch.stack(losses).mean()

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the random numbers of the base class, and those of each member with its own rows."""
        super()._save_rng_state(output_dir)
        for name, rows in self._own_rows:
            with drawing_from(rows.random):
                super()._save_rng_state(str(Path(output_dir, _RANDOM, name)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads what the base class loads, and the random numbers of each member with its own rows."""
        super()._load_optimizer_and_scheduler(checkpoint)
        for name, rows in self._own_rows if checkpoint is not None else ():
            with drawing_from(rows.random):
                super()._load_rng_state(str(Path(str(checkpoint), _RANDOM, name)))
                rows.random = random_state()

    # A step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Computes forward and backward for each member's copy of the batch; returns the mean of their losses."""
        if self.group.has_own_batches:
            return self._steps_on_own_rows(model)
        try:
            losses = self._passes(model, inputs, num_items_in_batch)
        except NotSplittableError:  # before any backward
            self.group.mixed = False
            self.group.note("each adapter needs its own pass: the loss of this model cannot be split by rows")
            losses = self._passes(model, inputs, num_items_in_batch)
        return torch.stack(losses).mean()

    def _passes(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> list[Tensor]:
        passes = self.group.passes(inputs)
        state = random_state() if len(passes) > 1 else None
        losses = []
        for index, members in enumerate(passes):
            if index and state is not None:  # each pass uses the random numbers that it would use alone
                set_random_state(state)
            losses += self._one_pass(model, dict(inputs), members, num_items)
        return losses

    def _one_pass(
        self, model: nn.Module, inputs: dict[str, Any], members: list[Member], num_items: Tensor | int | None
    ) -> list[Tensor]:
        if len(members) == 1:
            with self.group.alone(members[0]), self._minimizing(members[0]):
                losses = [super().training_step(model, inputs, num_items)]
        else:
            count, rows = len(members), len(next(iter(inputs.values())))
            batch = {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
            names = [member.name for member in members for _ in range(rows)]
            trained: Any = self.model
            share_of_step = getattr(super(), "share_of_step", None)
            share = None if share_of_step is None else share_of_step(inputs, num_items)
            splitting = split_loss(base_of(trained), count, batch, share)
            with serving_rows(trained.manager, names, (), batch), splitting as split:
                self._split = split
                try:
                    super().training_step(model, batch, num_items)
                finally:
                    self._split = None
            losses = [loss / loss_divisor(self, num_items) for loss in split.losses]
        for member, loss in zip(members, losses, strict=True):
            member.add_loss(loss)
        return losses

    def share_of_step(self, inputs: Mapping[str, Any], num_items_in_batch: Any) -> Any:
        """As the base class; a mixed batch has the shares in the losses of its members already."""
        trainer: Any = super()
        return trainer.share_of_step(inputs, num_items_in_batch) if self._split is None else torch.ones(())

    @contextmanager
    def _minimizing(self, member: Member) -> Iterator[None]:
        """Computes the loss of a member's objective inside the block, if the Trainer has one of its own."""
        trainer: Any = self
        former = getattr(trainer, "objective", None)
        if former is None:
            yield
            return
        trainer.objective, trainer.owner = member.objective, member.name
        trainer.rows_owner = "" if member.rows is None or member.comparable else member.name
        try:
            yield
        finally:
            trainer.objective, trainer.owner, trainer.rows_owner = former, "", ""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Computes the loss like the base class; refuses one that is not the sum of the members' losses."""
        loss = super().compute_loss(model, *args, **kwargs)
        if self._split is not None and not self._split_checked:
            self._split.check(loss[0] if isinstance(loss, tuple) else loss)
            self._split_checked = True
        return loss

    # Optimizer, schedule and clipping

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Creates one optimizer with parameter groups for each member."""
        if self.optimizer is not None:
            return self.optimizer
        whole: Any = self.model if model is None else model
        groups = [group for member in self.group.members for group in self._groups(member, whole)]
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, whole)
        self.optimizer = kind(groups, **options)
        self.group.join = self._join
        return self.optimizer

    def _groups(self, member: Member, whole: Any) -> list[dict[str, Any]]:
        """Returns the parameter groups of a member: with and without weight decay."""
        parameters = dict(whole.named_parameters())  # first, because this walk registers new adapters
        decayed = {id(parameters[name]) for name in self.get_decay_parameter_names(whole) if name in parameters}
        kind, options = self.get_optimizer_cls_and_kwargs(member.arguments, whole)
        if not isinstance(kind, type) or any(name in options for name in _OWN_PARAMETERS):
            name = getattr(self.args.optim, "value", self.args.optim)
            raise ConfigError(f"optim {name!r:.60} selects its parameters itself: not in a sweep", field="optim")
        own = {name: options[name] for name in _GROUP_OPTIONS if name in options}
        groups = []
        for decay in (True, False):
            chosen = [parameter for parameter in member.parameters if (id(parameter) in decayed) is decay]
            weight_decay = member.arguments.weight_decay if decay else 0.0
            groups.append({"params": chosen, "weight_decay": weight_decay, "member": member.name, **own})
        return [group for group in groups if group["params"]]

    def _join(self, clone: Member, source: Member) -> None:
        """Adds a new member to the optimizer with a copy of another's state, and its own schedule."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # as accelerate wraps them
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        factor = _factor(clone, clone.steps or int(self.state.max_steps))
        for group in self._groups(clone, self.model):
            rate = group["lr"]
            optimizer.add_param_group({**group, "initial_lr": rate, "lr": rate * factor(schedule.last_epoch)})
            schedule.base_lrs.append(rate)
            schedule.lr_lambdas.append(factor)
        for new, old in zip(clone.parameters, source.parameters, strict=True):
            if old in optimizer.state:
                optimizer.state[new] = copy.deepcopy(optimizer.state[old])

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Creates one schedule with a separate factor for each parameter group."""
        if self.lr_scheduler is None:
            factors = {
                member.name: _factor(member, member.steps or num_training_steps) for member in self.group.members
            }
            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(chosen, [factors[group["member"]] for group in chosen.param_groups])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norms = [norm for member in self.group.training if (norm := member.clip()) is not None]
        return torch.stack(norms).max() if norms else torch.zeros(())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Returns the norm like the base class, but separately: one diverging member must not affect the others."""
        if grad_norm is not None or not self.group.training:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return torch.stack([member.measure_norm() for member in self.group.training]).max().item()

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates each member that is trained; returns the outputs of the one with the lowest loss."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        members, outputs, found = self.group.evaluated or self.group.training or list(self.group.members), [], {}
        self.group.evaluated = []
        state = random_state()
        try:
            for member in members:
                self._evaluated = member
                set_random_state(state)  # an evaluation draws random numbers, as many as that of a training alone
                with self._evaluating(member, args, prefix) as own:
                    outputs.append(super().evaluation_loop(*own, **kwargs))
                found[member.name] = _reported(outputs[-1].metrics or {}, prefix)
                member.evaluated(self.state.global_step, self.args, found[member.name])
        finally:
            self._evaluated = None
        if self.is_in_train:
            self.log(named_metrics(found))
        return min(outputs, key=partial(_rank, args=self.args, prefix=prefix))

    @contextmanager
    def _evaluating(self, member: Member, args: tuple[Any, ...], prefix: str) -> Iterator[tuple[Any, ...]]:
        """Yields the positional arguments of an evaluation, with the member's own rows if it has some."""
        if member.rows is None:
            yield args
            return
        with member.rows.drawing():
            if self.is_in_train and prefix == "eval" and args:
                vars(self).pop("_eval_dataloaders", None)  # a Trainer with persistent workers keeps one loader for all
                args = (self.get_eval_dataloader(member.rows.evaluation), *args[1:])
            yield args

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Predicts like the base class, with the member that is being evaluated."""
        if self._evaluated is None:
            return super().prediction_step(model, *args, **kwargs)
        with self.group.alone(self._evaluated), self._minimizing(self._evaluated):
            return super().prediction_step(model, *args, **kwargs)


def trainer_for(trainer_class: type[Any], group: SideBySide, given: Mapping[str, Any]) -> type[Any]:
    """Derives a Trainer class that trains the members of a group.

    Raises:
        ConfigError: an argument does not support several adapters.
    """
    for name, reason in _REFUSED.items():
        if given.get(name) not in (None, False):
            raise ConfigError(f"{name} cannot be combined with several adapters: {reason}", field=name)
    if has_own_loss(trainer_class) or given.get("compute_loss_func") is not None or given.get("label_smoothing_factor"):
        group.mixed = False  # its result for a mixed batch is unknown
    members = {"group": group, "given_class": trainer_class}
    return type(trainer_class.__name__, (SideBySideTrainer, trainer_class), members)


class SideBySideCallback(TrainerCallback, ExportableState):
    """Records the members' steps, and removes members that were stopped or have diverged from the batch."""

    def __init__(self, group: SideBySide, run: Run, *, stop_on_divergence: bool) -> None:
        self._group, self._run, self._stops = group, run, stop_on_divergence
        self._throttle = Throttle()
        group.note = run.note
        run.members, run.check_clone = group.states, group.check_clone

    def state(self) -> dict[str, Any]:
        """Returns the state for checkpoints: the stopped members, the own fields of each, and the losses of each."""
        stopped = {member.name: member.status for member in self._group.members if member.status != "training"}
        members = [list(pair) for pair in self._group.fields().items()]  # a list: the file sorts dictionaries
        kept = {"members": members} if is_plain_value(members) else {}
        losses = {member.name: [list(point) for point in member.losses] for member in self._group.members}
        return {"args": {}, "attributes": {"stopped": stopped, "losses": losses, **kept}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the members of a resumed run their losses, and stops those that were already stopped."""
        kept = {"stateful_callbacks": state.stateful_callbacks}
        losses, stopped = (_kept(kept, name) for name in ("losses", "stopped"))
        for member in self._group.members:
            member.take_over(checked_points(losses.get(member.name), state.global_step))
            if (status := stopped.get(member.name)) in _ENDS:
                self._group.stop(member.name, status)
        if self._stops:
            self._throttle(lambda: self._copy(state.global_step))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the learning rates of the step."""
        rates = {group["member"]: float(group["lr"]) for group in kwargs["optimizer"].param_groups}
        for member in self._group.training:
            member.learning_rate = rates.get(member.name)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copies the weights of the members at intervals."""
        if self._stops and self._throttle.due:
            self._throttle(lambda: self._copy(state.global_step))

    def _copy(self, step: int) -> None:
        for member in self._group.training:
            member.keep(step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Records the step of each member, and stops members."""
        self._group.learned = True
        for member in self._group.training:
            member.end_step(state.global_step)
        last = state.global_step >= state.max_steps > 0
        ending = [member for member in self._group.training if member not in self._group.unfinished(state.global_step)]
        if ending and not control.should_evaluate and args.eval_strategy != "no":  # as at the end of a training alone
            self._group.evaluated, control.should_evaluate = ending, True
        if self._stops and (control.should_log or control.should_evaluate or control.should_save or last):
            self._stop_diverged(state.global_step, weights=last or control.should_evaluate or control.should_save)
        for name in self._run.control.members_to_stop:
            self._group.stop(name)
        for request in self._run.control.take_clones():
            self._clone(request, state.global_step)
        if not self._group.unfinished(state.global_step) and not (last and self._group.training):
            self._run.note("" if self._run.diverged or self._group.training else "all adapters have stopped")
            control.should_training_stop = True
            if self._run.diverged:
                control.should_evaluate = control.should_save = False

    def _stop_diverged(self, step: int, *, weights: bool) -> None:
        """Stops the members that have diverged, and restores their last good weights."""
        for member in [member for member in self._group.training if member.has_diverged(weights=weights)]:
            kept = member.restore()
            self._group.stop(member.name, "diverged")
            self._run.replaced_weights()
            restored = "" if kept is None else f"; {self._run.weights_of(kept)} were restored"
            self._run.note(f"{member.name} diverged at step {step:,} and is no longer trained{restored}", warning=True)
        if all(member.status == "diverged" for member in self._group.members):
            self._run.diverge("all adapters diverged", max(member.good_step or 0 for member in self._group.members))

    def _clone(self, request: CloneRequest, step: int) -> None:
        """Carries a request out; if it fails, adds a note to the run, and training continues."""
        try:
            clone = self._group.clone(request)
        except NbpeftError as error:
            self._run.note(f"{request.source} was not cloned: {error}", warning=True)
            return
        self._run.adapters = tuple(self._group.names)
        self._run.note(f"{clone.name} forked from {request.source} at step {step:,}")


def kept_members(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the adapters, clones included, that a checkpoint's ``trainer_state.json`` has, with their own fields."""
    kept = _kept(state, "members", of=(Mapping, list))
    pairs = kept.items() if isinstance(kept, Mapping) else kept
    named = [pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]
    return {name: dict(own) for name, own in named if isinstance(name, str) and isinstance(own, Mapping)}


def _kept(state: Mapping[str, Any], name: str, of: Any = Mapping) -> Any:
    """Returns an attribute of a ``SideBySideCallback`` in a checkpoint; empty if none of that type is there."""
    kept: Any = state
    for key in ("stateful_callbacks", SideBySideCallback.__name__, "attributes", name):
        kept = kept.get(key) if isinstance(kept, Mapping) else None
    return kept if isinstance(kept, of) else {}


def _factor(member: Member, steps: int) -> Any:
    """Returns the factor on a member's learning rate, as a function of the step."""
    arguments = member.arguments
    options: Any = arguments.lr_scheduler_kwargs
    schedule: LRScheduler = transformers.get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=options,
    )
    if not isinstance(schedule, LambdaLR):
        kind = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
        raise ConfigError(
            f"lr_scheduler_type {kind!r} depends on a single loss, unlike a sweep: use linear, cosine or constant",
            field="lr_scheduler_type",
        )
    return schedule.lr_lambdas[0]


def _reported(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Returns the loss and the metrics of an evaluation, by the names of a single one."""
    named = {f"eval_{name.removeprefix(f'{prefix}_')}": value for name, value in metrics.items()}
    known = metrics_of(named)  # an objective's metrics keep their prefix in it
    found = {name: value for name, value in named.items() if name in known or name.removeprefix("eval_") in known}
    return found | ({"eval_loss": named["eval_loss"]} if named.get("eval_loss") is not None else {})


def _rank(output: Any, args: TrainingArguments, prefix: str) -> float:
    reported = _reported(output.metrics, prefix)
    score = score_of(args, reported)
    score = reported.get("eval_loss") if score is None else score
    return score if score is not None and math.isfinite(score) else math.inf
