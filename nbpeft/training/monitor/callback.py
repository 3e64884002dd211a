"""Connects a transformers Trainer to a run: it feeds the run and carries out its Stop and Pause."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft.training.disk.agreement import is_distributed
from nbpeft.training.monitor.record import score_of
from nbpeft.training.monitor.run import Run, StopRun

_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What a Trainer reports of an evaluation besides its loss and the values of ``compute_metrics``."""


class RunCallback(TrainerCallback):
    """Add it to any Trainer: ``trainer.add_callback(RunCallback(run))``.

    Stop ends training after the step it is in, skips the evaluation that would follow, and
    writes a checkpoint where the Trainer writes checkpoints at all.

    Args:
        run: The run to feed. Outside a ``with run:`` block it is finished at the end of training.

    Attributes:
        batch_shape: rows and tokens a row of the last batch; None before the first one.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.batch_shape: tuple[int, int] | None = None

    def count_batch(self, inputs: Mapping[str, Any]) -> None:
        """Counts the input tokens of a batch, without waiting for the device."""
        self.batch_shape = shape_of(inputs)
        tokens = count_tokens(inputs)
        if tokens is not None:
            self.run.record(0, tokens=tokens)

    def note(self, message: str) -> None:
        """Adds to the line shown with the run."""
        self.run.note(message)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the run the number of steps to come."""
        total = state.max_steps if state.max_steps > 0 else None
        self.run.begin(total_steps=total, step=state.global_step, earlier=state.log_history)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends a run that is resumed after its last step: a Trainer would do one more."""
        if 0 < state.max_steps <= state.global_step and self.run.entered and not is_distributed():
            self.run.note(f"no step was left: it had finished at step {state.global_step:,}")
            raise StopRun(self.run, finished=True)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Carries out Stop and Pause between the batches of one optimizer step."""
        self._stop_if_requested(args, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes the step, then carries out Stop and Pause."""
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
        """Notes what the Trainer has logged."""
        if logs and "loss" in logs:
            self.run.record(
                state.global_step,
                loss=float(logs["loss"]),
                learning_rate=logs.get("learning_rate"),
                epoch=state.epoch,
                gradient_norm=logs.get("grad_norm"),
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Notes the loss on held-out data, and the values of ``compute_metrics``."""
        if metrics:
            values = metrics_of(metrics)
            self.run.evaluated(
                metrics.get("eval_loss"), state.global_step, metrics=values, score=score_of(args, metrics)
            )

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Carries out Pause during an evaluation, and Stop where the run can end it at once."""
        if self.run.wait_or_stop() and self.run.entered and not is_distributed():
            raise StopRun(self.run)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After Stop, no evaluation is begun; a training that diverged saves nothing either."""
        if self.run.control.stop_requested or self.run.diverged:
            control.should_evaluate = False
        if self.run.diverged:
            control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finishes a run that no block finishes."""
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
    """The numbers of ``compute_metrics`` in what a Trainer reports of an evaluation, without ``eval_``."""
    named = {name.removeprefix("eval_"): value for name, value in reported.items() if name.startswith("eval_")}
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, int | float) and name != "loss" and not name.endswith(_TIMES)
    }


def shape_of(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and tokens a row of a batch, or None where it has none."""
    for name in ("input_ids", "inputs_embeds", "input_values"):
        tensor = inputs.get(name)
        if isinstance(tensor, Tensor) and tensor.ndim >= 2:
            return int(tensor.shape[0]), int(tensor.shape[1])
    return None


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether any process of a distributed run has the flag set; every process must call it.

    Processes that end at different steps would wait for each other for ever.
    """
    if not is_distributed():
        return flag
    flags = torch.tensor([int(flag)], device=device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags.item())


def count_tokens(inputs: Mapping[str, Any]) -> int | Tensor | None:
    """Input tokens of a batch: unmasked ones where there is a mask; None without tokens."""
    mask, tokens, positions = (inputs.get(name) for name in ("attention_mask", "input_ids", "position_ids"))
    if isinstance(mask, Tensor):
        return mask.detach().ne(0).sum()
    if isinstance(positions, Tensor) and positions.ndim == 2:  # packed: padding has no position but 0
        starts = positions.detach().eq(0)
        return starts.numel() - (starts & nn.functional.pad(starts[:, 1:], (0, 1), value=True)).sum()
    return tokens.numel() if isinstance(tokens, Tensor) else None
