"""Samples answers to fixed prompts during a run, of the current adapter and of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft.engine.changes.random_numbers import random_state, set_random_state
from nbpeft.engine.config.adapter_names import BASE_NAME
from nbpeft.errors import in_one_line
from nbpeft.model.saving.sharded import is_sharded
from nbpeft.state import Answer, Sample
from nbpeft.training.monitor.run import Run
from nbpeft.training.watching.generation import GenerationRequest, evaluating, generate_batch
from nbpeft.training.watching.prompts import SamplePrompts

TIMES = 5
"""The default number of samples per run."""
MAX_NEW_TOKENS = 48


class SampleCallback(TrainerCallback):
    """Lets the model answer greedily between two steps, without any effect on the training.

    If the model cannot answer, sampling ends, but not the run.

    Args:
        run: the run, to which the samples are added.
        model: the model in training, a ``PeftModel``.
        prompts: the prompts.
        every: steps between samples; None: about ``TIMES`` per run.
    """

    def __init__(self, run: Run, model: Any, prompts: SamplePrompts, every: int | None) -> None:
        self._run, self._model, self._prompts, self._every = run, model, prompts, every
        self._base: list[Answer] = []
        self._failed = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Samples if it is due, and after the last step."""
        every = self._every or max(1, -(-state.max_steps // TIMES))
        due = state.global_step % every == 0 or state.global_step == state.max_steps
        mine = state.is_world_process_zero or is_sharded(self._model)  # each process has a shard, so all must take part
        if due and mine and not self._failed and not self._run.control.stop_requested:
            self._sample(state.global_step)

    def _sample(self, step: int) -> None:
        batch = self._prompts.batch
        try:
            with undisturbed(self._model):
                if not self._base:
                    self._base = self._answers([BASE_NAME] * len(batch.prompts))
                answers = self._answers(None)
        except Exception as error:
            self._failed = True
            self._run.note(f"no samples: {type(error).__name__}: {in_one_line(error):.200}", warning=True)
            return
        wanted = self._prompts.wanted or ("",) * len(answers)
        samples = zip(batch.prompts, answers, self._base, wanted, strict=True)
        self._run.sampled(
            Sample(step, prompt, mine.text, base.text, reference, cut=mine.cut, base_cut=base.cut)
            for prompt, mine, base, reference in samples
        )

    def _answers(self, rows: Sequence[str] | None) -> list[Answer]:
        control = self._run.control
        request = GenerationRequest(
            rows,
            MAX_NEW_TOKENS,
            {"use_cache": True},
            should_stop=lambda: control.stop_requested,
        )
        answers, ended = generate_batch(self._model, self._prompts.batch, request)
        if not ended and not control.stop_requested:
            raise KeyboardInterrupt  # generate_batch swallowed an interrupt that was meant for the run
        return answers


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """A block in evaluation mode and without gradients, after which the random number generators are restored."""
    state = random_state()
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        set_random_state(state)
