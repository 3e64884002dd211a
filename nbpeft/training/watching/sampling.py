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
from nbpeft.errors import ConfigError, in_one_line
from nbpeft.model.saving.sharded import is_sharded
from nbpeft.state import Sample
from nbpeft.training.monitor.run import Run
from nbpeft.training.watching.generation import GenerationRequest, PromptBatch, evaluating, generate_batch

TIMES = 5
"""The default number of samples per run."""
MOST_PROMPTS = 8
MAX_NEW_TOKENS = 48


class SampleCallback(TrainerCallback):
    """Lets the model answer greedily between two steps, without any effect on the training.

    If the model cannot answer, sampling ends, but not the run.

    Args:
        run: the run, to which the samples are added.
        model: the model in training, a ``PeftModel``.
        batch: the prompts.
        every: steps between samples; None: about ``TIMES`` per run.
    """

    def __init__(self, run: Run, model: Any, batch: PromptBatch, every: int | None) -> None:
        self._run, self._model, self._batch, self._every = run, model, batch, every
        self._base: list[str] = []
        self._failed = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Samples if it is due, and after the last step."""
        every = self._every or max(1, -(-state.max_steps // TIMES))
        due = state.global_step % every == 0 or state.global_step == state.max_steps
        mine = state.is_world_process_zero or is_sharded(self._model)  # each process has a shard, so all must take part
        if due and mine and not self._failed and not self._run.control.stop_requested:
            self._sample(state.global_step)

    def _sample(self, step: int) -> None:
        try:
            with undisturbed(self._model):
                if not self._base:
                    self._base = self._answers([BASE_NAME])
                answers = self._answers(None)
        except Exception as error:
            self._failed = True
            self._run.note(f"no samples: {type(error).__name__}: {in_one_line(error):.200}", warning=True)
            return
        samples = zip(self._batch.prompts, answers, self._base, strict=True)
        self._run.sampled(Sample(step, prompt, answer, base) for prompt, answer, base in samples)

    def _answers(self, rows: Sequence[str] | None) -> list[str]:
        control = self._run.control
        request = GenerationRequest(
            rows,
            MAX_NEW_TOKENS,
            {"use_cache": True},
            should_stop=lambda: control.stop_requested,
        )
        answers, ended = generate_batch(self._model, self._batch, request)
        if not ended and not control.stop_requested:
            raise KeyboardInterrupt  # generate_batch swallowed an interrupt that was meant for the run
        return [answer.text for answer in answers]


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """A block in evaluation mode and without gradients, after which the random number generators are restored."""
    state = random_state()
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        set_random_state(state)


def sample_batch(model: Any, prompts: object, tokenizer: Any, every: object, *, plain: bool | None) -> PromptBatch:
    """Tokenises the prompts to sample.

    Args:
        model: the model with adapters.
        prompts: one text or several.
        tokenizer: the tokenizer of the model.
        every: steps between samples, or None.
        plain: whether the training rows are rendered without a chat template.

    Raises:
        ConfigError: an argument is invalid, or the model or tokenizer cannot generate answers.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"sample must be a prompt, or several in a list, not {prompts!r:.60}", field="sample")
    if len(texts) > MOST_PROMPTS:
        raise ConfigError(f"sample takes at most {MOST_PROMPTS} prompts, not {len(texts)}", field="sample")
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ConfigError(f"every must be a number of steps of at least 1, not {every!r:.60}", field="every")
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        raise ConfigError("sample needs a tokenizer: pass tokenizer=…", field="sample")
    base = model.manager.model if hasattr(model, "manager") else model
    if not hasattr(base, "generate"):
        raise ConfigError(f"a {type(base).__name__} cannot answer prompts, so that there is nothing to sample")
    return PromptBatch.of(texts, tokenizer, base, chat=False if plain else None)
