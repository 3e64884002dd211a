"""Connects a transformers Trainer to a run: it feeds the run and carries out Stop and Pause."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft.names import REJECTED
from nbpeft.training.disk.agreement import is_distributed
from nbpeft.training.monitor.record import is_of_objective, score_of
from nbpeft.training.monitor.run import Run, StopRun

_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""The metrics that a Trainer adds to those of ``compute_metrics``, without their prefix."""


class RunCallback(TrainerCallback):
    """Reports a Trainer's progress to a run; for any Trainer: ``trainer.add_callback(RunCallback(run))``.

    Stop ends training after the current step, skips the evaluation that would follow, and
    writes a checkpoint if the Trainer saves checkpoints by steps.

    Args:
        run: The run to feed. Outside a ``with run:`` block it is finished at the end of training.

    Attributes:
        batch_shape: rows and tokens per row of the last batch; None before the first one.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.batch_shape: tuple[int, int] | None = None
        self.device = torch.device("cpu")

    def count_batch(self, inputs: Mapping[str, Any]) -> None:
        """Counts the input tokens of a batch, and of those of other processes, without waiting for the device."""
        self.batch_shape = shape_of(inputs)
        tokens = count_tokens(inputs)
        if tokens is not None and is_distributed():
            tokens = torch.as_tensor(tokens, device=self.device)
            distributed.all_reduce(tokens)
        if tokens is not None:
            self.run.record(0, tokens=tokens)

    def note(self, message: str) -> None:
        """Adds a note to the line shown with the run."""
        self.run.note(message)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the run with the total number of steps and, if resumed, the steps done before."""
        self.device = args.device
        total = state.max_steps if state.max_steps > 0 else None
        self.run.begin(total_steps=total, step=state.global_step, earlier=state.log_history)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends a run that is resumed after its last step: a Trainer would make one more."""
        if 0 < state.max_steps <= state.global_step and self.run.entered and not is_distributed():
            self.run.note(f"no steps left: the run had already finished at step {state.global_step:,}")
            raise StopRun(self.run, finished=True)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Carries out Stop and Pause between the batches of one optimizer step."""
        self._stop_if_requested(args, control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Marks that the weights are others from here on, also if the step does not end.

        The adapters of a sweep are removed unless a step has ended.
        """
        self.run.touched = not self.run.members("running")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Records the step, then carries out Stop and Pause."""
        self.run.record(state.global_step, epoch=state.epoch)
        self._stop_if_requested(args, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Records what the Trainer has logged."""
        if logs and "loss" in logs:
            self.run.record(
                state.global_step,
                loss=float(logs["loss"]),
                learning_rate=logs.get("learning_rate"),
                epoch=state.epoch,
                gradient_norm=logs.get("grad_norm"),
            )
            self.run.trace({name: value for name, value in logs.items() if is_of_objective(name)}, state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Records the loss on evaluation data, and the values of ``compute_metrics``."""
        if metrics:
            values, score = metrics_of(metrics), score_of(args, metrics)
            if score is None and args.metric_for_best_model:  # without the metric it is never the best
                score = math.nan
            self.run.evaluated(metrics.get("eval_loss"), state.global_step, metrics=values, score=score)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Carries out Pause during an evaluation, and Stop if the run can end at once."""
        if self.run.wait_or_stop() and self.run.entered and not is_distributed():
            raise StopRun(self.run)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Carries out a Stop that came with the last step, before the evaluation; does not save a diverged run."""
        self._stop_if_requested(args, control)
        if self.run.diverged:
            control.should_evaluate = control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes whether the best weights were loaded, and finishes a run that is not inside a ``with run:`` block."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.run.restored_step = state.best_global_step
        if self.run.entered:
            return
        if self.run.cut_short:
            self.run.finish("stopped")
        else:
            self.run.finish("finished")

    def _stop_if_requested(self, args: TrainingArguments, control: TrainerControl) -> None:
        if any_process(self.run.wait_or_stop(), args.device):
            control.should_training_stop = True
            control.should_evaluate = False
            control.should_save = control.should_save or str(getattr(args.save_strategy, "value", "no")) == "steps"


def metrics_of(reported: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of ``compute_metrics`` among the metrics a Trainer reports of an evaluation, without ``eval_``.

    Metrics of an objective, such as ``eval_rewards/margins``, keep it: training has a curve of the same name.
    """
    named = {
        name if is_of_objective(name.removeprefix("eval_")) else name.removeprefix("eval_"): value
        for name, value in reported.items()
        if name.startswith("eval_")
    }
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, int | float) and name != "loss" and not name.endswith(_TIMES)
    }


def shape_of(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """The number of sequences and of tokens per sequence of a batch; None for a batch without tokens."""
    for name in ("input_ids", "inputs_embeds", "input_values"):
        tensor = inputs.get(name)
        if isinstance(tensor, Tensor) and tensor.ndim >= 2:
            sequences = 2 if f"{REJECTED}{name}" in inputs else 1
            return sequences * int(tensor.shape[0]), int(tensor.shape[1])
    return None


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether any process of a distributed run has the flag set; every process must call it.

    Processes that end at different steps would wait for each other's collective operations for ever.
    """
    if not is_distributed():
        return flag
    flags = torch.tensor([int(flag)], device=device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags.item())


def count_tokens(inputs: Mapping[str, Any]) -> int | Tensor | None:
    """The number of input tokens of a batch, without masked ones; None for a batch without tokens."""
    mask, tokens, positions = (inputs.get(name) for name in ("attention_mask", "input_ids", "position_ids"))
    if isinstance(mask, Tensor):
        rejected = inputs.get(f"{REJECTED}attention_mask")
        return sum(part.detach().ne(0).sum() for part in (mask, rejected) if isinstance(part, Tensor))
    if isinstance(positions, Tensor) and positions.ndim == 2:  # packed: all padding has position 0
        starts = positions.detach().eq(0)
        return starts.numel() - (starts & nn.functional.pad(starts[:, 1:], (0, 1), value=True)).sum()
    return tokens.numel() if isinstance(tokens, Tensor) else None
