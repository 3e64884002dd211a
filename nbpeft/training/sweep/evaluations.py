"""The evaluations of the adapters of a sweep: their curves in a resumed run, and the early stopping of each."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft.checkpoint.tensor_file import storable, write_tensors
from nbpeft.errors import ConfigError
from nbpeft.sweeps import halvings, remaining
from nbpeft.training.adapters.method_state import read_state
from nbpeft.training.monitor.run import Run
from nbpeft.training.sweep.members import Evaluation, Member, SideBySide
from nbpeft.training.watching.early_stop import (
    KEPT,
    EarlyStop,
    Patience,
    evaluate_usually,
    kept_file,
    never_evaluates,
    note_too_few,
)
from nbpeft.training.watching.scoring import metrics_named


class SweepEvaluations(EarlyStop):
    """Ends an adapter after ``patience`` evaluations without improvement; each ends with its best weights.

    Args:
        group: the adapters.
        run: their common run.
        model: the model in training.
        patience: number of evaluations without improvement; None to stop none, and to keep no weights.
        halves: whether the worse half of the adapters is stopped each time the number of steps has doubled.
    """

    def __init__(
        self, group: SideBySide, run: Run, model: nn.Module, patience: int | None, *, halves: bool = False
    ) -> None:
        super().__init__(run, model, patience)
        self._halves = halves
        self._group, self._keeps = group, patience is not None
        self._patience_of: dict[str, Patience] = defaultdict(lambda: Patience(patience))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """In a resumed run, restores the curves, counts the evaluations so far, and loads the best weights."""
        note_too_few(self._run, args, state, self._most)
        metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
        self._group.metric = "" if metric == "loss" else metric
        file = kept_file(args) if self._keeps else None
        saved = {} if file is None else read_state(file, self._model)[0]
        for member in self._group.members:
            best = None
            for entry in state.log_history:
                if reported := metrics_named(entry, member.name):
                    member.evaluated(int(entry.get("step", 0)), args, reported)
                    best = self._counted(member) or best
            if best is not None and self._keeps:
                self._take_over(member, best, saved, state.global_step)

    def _take_over(self, member: Member, best: Evaluation, saved: dict[str, Tensor], step: int) -> None:
        """Keeps the best weights of a resumed run, which the model has now, or which were saved."""
        keys = {name: _key(member, name) for name in member.numbered}
        if best.step == step:
            member.keep_best(best)
        elif all(key in saved and saved[key].shape == member.numbered[name].shape for name, key in keys.items()):
            member.keep_best(best, {name: saved[key] for name, key in keys.items()})
        elif member.status != "training":  # they were restored when it was stopped
            member.keep_best(best)
            member.restore()
        else:
            missing = f"the weights of step {best.step:,}, the best of {member.name}, were not saved"
            self._run.note(f"{missing}: only a better step can be kept", warning=True)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Copies the weights of adapters that improved, and ends those that did not improve for long."""
        for member in self._group.training:
            best, patience = self._counted(member), self._patience_of[member.name]
            if best is not None and self._keeps:
                member.keep_best(best)
            elif patience.is_over:
                back = "" if member.restore() is None else f", with the weights of step {patience.best_step:,}"
                self._group.stop(member.name)
                self._run.note(f"{member.name} stopped early ({patience}){back}")
        if self._halves:
            self._halve(state)
        if not self._group.training:
            control.should_training_stop = True

    def _halve(self, state: TrainerState) -> None:
        """Stops the adapters with the worst evaluations at this step, if it is a rung or the first one after it."""
        step, training = state.global_step, self._group.training
        if step >= state.max_steps:  # none is left to be stopped
            return
        if any(member.evaluated_step != step for member in training):  # by the metric that decides
            return
        most = remaining(len(self._group.members), step, state.max_steps)
        ranked = sorted(training, key=lambda member: member.state("running").rank)
        if worse := ranked[most:]:
            for member in worse:
                self._group.stop(member.name)
            names = ", ".join(member.name for member in training if member in worse)
            self._run.note(f"stopped at step {step:,} as the worse of {len(training)} adapters: {names}")

    def _counted(self, member: Member) -> Evaluation | None:
        """Counts the last evaluation of an adapter, and returns it if it is the best so far."""
        news = member.take_news()
        better = news is not None and self._patience_of[member.name].is_better(news.score, news.step)
        return news if better else None

    def write(self, folder: Path) -> None:
        """Writes the best weights of each adapter into the checkpoint of a later step.

        Raises:
            OSError: the file cannot be written.
        """
        kept = {
            _key(member, name): weight
            for member in self._later
            for name, weight in (member.best.weights if member.best else {}).items()
        }
        if kept:
            write_tensors(folder / KEPT, storable(kept), {})

    @property
    def _later(self) -> list[Member]:
        """The adapters that were trained further since their best evaluation."""
        return [member for member in self._group.members if not member.is_at_best]

    def _restore(self) -> None:
        later = self._later
        if not later:
            return
        if self.keep_last is not None:
            self.keep_last()
        for member in later:
            member.restore()
        steps = (f"{member.name} of step {member.best.step:,}" for member in later if member.best is not None)
        self._run.note(f"the best weights were restored: {', '.join(steps)}")


def check_halving(request: Any, fields: dict[str, Any], *, evaluates: bool, scores: bool) -> None:
    """Refuses successive halving where adapters cannot be compared, and sets when to evaluate in ``fields``.

    Raises:
        ConfigError: there is no sweep, nothing is evaluated, or each adapter has its own rows.
    """
    if not request.halving:
        return
    members = request.members
    if not isinstance(members, SideBySide):
        raise ConfigError("halving=True has no effect without a sweep: pass patience=… to stop early", field="halving")
    if request.own_rows:
        raise ConfigError("halving=True compares adapters, but each has rows of its own: remove it", field="halving")
    if not scores and (not evaluates or never_evaluates(fields)):
        raise ConfigError("halving=True needs evaluations: pass eval_data=… or score=…", field="halving")
    if not scores:
        evaluate_usually(fields, 0.5 ** halvings(len(members.members)))


def _key(member: Member, name: str) -> str:
    return f"{member.name}/{name}"
