"""What a run was stopped or killed before, scores and an evaluation: a resumed run makes them first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from nbpeft.training.disk.agreement import is_distributed
from nbpeft.training.disk.checkpoints import read_errors
from nbpeft.training.monitor.run import Run, StopRun
from nbpeft.training.watching.scoring import ScoreCallback


@contextmanager
def late_evaluation(trainer: Any, run: Run) -> Iterator[None]:
    """A block in which a resumed Trainer makes the scores and the evaluation that were due at its step, if not logged.

    An evaluation draws random numbers, so it comes between those that the checkpoint restores and the next step.
    """
    load = trainer._load_rng_state

    def load_and_evaluate(checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else read_errors(Path(checkpoint)):
            load(checkpoint)
        if checkpoint is None or is_distributed():
            return
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ScoreCallback):
                callback.make_up(trainer.args, trainer.state, trainer.control)
        if _is_owed(trainer):
            metrics = trainer._evaluate(None, None)
            trainer._determine_best_metric(metrics=metrics, trial=None)
        if trainer.control.should_training_stop:  # a Trainer would make one more step
            raise StopRun(run, finished=True)

    trainer._load_rng_state = load_and_evaluate
    try:
        yield
    finally:
        del trainer._load_rng_state  # it references the Trainer, whose memory would not be freed at once


def _is_owed(trainer: Any) -> bool:
    """Returns whether an evaluation was due at the last step and is not logged."""
    args, state = trainer.args, trainer.state
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    if strategy == "steps":
        due = state.global_step % state.eval_steps == 0 and args.eval_delay <= state.global_step
    else:
        due = strategy == "epoch" and float(state.epoch or 0).is_integer() and args.eval_delay <= state.epoch
    logged = (name for entry in state.log_history if entry.get("step") == state.global_step for name in entry)
    return state.global_step > 0 and due and not any(_is_of_evaluation(name) for name in logged)


def _is_of_evaluation(name: str) -> bool:
    return name.startswith("eval_") and name.endswith("_runtime")
