"""The evaluations of the adapters of a sweep: their curves in a resumed run, and early stopping of each by its own."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft.checkpoint.tensor_file import storable, write_tensors
from nbpeft.training.adapters.method_state import read_state
from nbpeft.training.monitor.run import Run
from nbpeft.training.sweep.members import Evaluation, Member, SideBySide
from nbpeft.training.watching.early_stop import KEPT, EarlyStop, Patience, kept_file
from nbpeft.training.watching.scoring import metrics_named


class SweepEvaluations(EarlyStop):
    """Ends an adapter after ``patience`` evaluations without improvement; each ends with its best weights.

    Args:
        group: the adapters.
        run: their common run.
        model: the model in training.
        patience: number of evaluations without improvement; None to stop none, and to keep no weights.
    """

    def __init__(self, group: SideBySide, run: Run, model: nn.Module, patience: int | None) -> None:
        super().__init__(run, model, patience)
        self._group, self._keeps = group, patience is not None
        self._patience_of: dict[str, Patience] = defaultdict(lambda: Patience(patience))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """In a resumed run, restores the curves, counts the evaluations so far, and loads the best weights."""
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
            if best is not None and self._keeps and member.status == "training":
                self._take_over(member, best, saved, state.global_step)

    def _take_over(self, member: Member, best: Evaluation, saved: dict[str, Tensor], step: int) -> None:
        """Keeps the best weights of a resumed run, which the model has now, or which were saved."""
        if best.step == step:
            member.keep_best(best)
            return
        keys = {name: _key(member, name) for name in member.numbered}
        if all(key in saved and saved[key].shape == member.numbered[name].shape for name, key in keys.items()):
            member.keep_best(best, {name: saved[key] for name, key in keys.items()})
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
        if not self._group.training:
            control.should_training_stop = True

    def _counted(self, member: Member) -> Evaluation | None:
        """Counts the last evaluation of an adapter, and returns it if it is the best so far."""
        news = member.take_news()
        better = news is not None and self._patience_of[member.name].is_better(news.score, news.step)
        return news if better else None

    def write(self, folder: Path) -> None:
        """Writes the best weights of each adapter into the checkpoint of a later step.

        Args:
            folder: the folder of the checkpoint.

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


def _key(member: Member, name: str) -> str:
    return f"{member.name}/{name}"
