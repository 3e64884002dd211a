"""Completions that the model in training generates, and batches of them to learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbpeft._util.out_of_memory import is_out_of_memory
from nbpeft.errors import NbpeftError, TrainingError, in_one_line
from nbpeft.names import IGNORED_LABEL
from nbpeft.training.data import Collator
from nbpeft.training.objectives.grpo import Grpo
from nbpeft.training.watching.generation import GenerationRequest, PromptBatch, evaluating, generate_tokens

_TRIED_TOKENS = 4
_LARGEST_GAP = 0.5
"""How much more likely, as a difference of logits, a token may be than the one that was generated with the cache."""


@dataclass(frozen=True)
class Completion:
    """A completion of a row's prompt.

    Attributes:
        row: the tokenized row, with its ``prompt`` and ``columns``.
        token_ids: its tokens, with the one that ends it.
        text: the same as text, without special tokens.
        ended: whether the model ended it; else it was cut.
    """

    row: Mapping[str, Any]
    token_ids: tuple[int, ...]
    text: str
    ended: bool

    @property
    def number(self) -> int:
        """The number of its row in the data, 0 for the first."""
        return int(self.row["number"])

    @property
    def prompt(self) -> Any:
        """The prompt: a text, or a list of messages."""
        return self.row["prompt"]

    @property
    def columns(self) -> Mapping[str, Any]:
        """The other columns of the row."""
        columns: Mapping[str, Any] = self.row["columns"]
        return columns

    @property
    def shown(self) -> Any:
        """The completion as reward functions get it: a text, or for a conversation a list with one message."""
        return self.text if isinstance(self.prompt, str) else [{"role": "assistant", "content": self.text}]

    @property
    def prompt_text(self) -> str:
        """The prompt as text; of a conversation the last message."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content", ""))

    def tokens(self, *, learned: bool) -> dict[str, list[int]]:
        """Prompt and completion as one row, in which the completion is learned, or nothing is.

        Args:
            learned: whether the completion is learned.
        """
        prompt, answer = list(self.row["input_ids"]), list(self.token_ids)
        labels = answer if learned else [IGNORED_LABEL] * len(answer)
        return {"input_ids": prompt + answer, "labels": [IGNORED_LABEL] * len(prompt) + labels}


@dataclass(frozen=True)
class PromptRows:
    """Rows to complete, as an element of a batch that is not moved to a device: their columns may have any type."""

    rows: tuple[Mapping[str, Any], ...]


@dataclass
class PromptCollator:
    """Collates rows whose prompts are to be completed.

    Attributes:
        collator: pads the completions.
    """

    collator: Collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates rows: the rows themselves, and their numbers as a tensor."""
        return {"prompts": PromptRows(tuple(rows)), "numbers": torch.tensor([row["number"] for row in rows])}


def generated(
    model: Any, base: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any, objective: Grpo, stop: Callable[[], bool]
) -> list[Completion]:
    """Draws one completion for each row, with the active adapters.

    Args:
        model: the model in training.
        base: its base model.
        rows: tokenized rows.
        tokenizer: its tokenizer.
        objective: how completions are drawn.
        stop: called after each token; may raise.

    Raises:
        KeyboardInterrupt: the generation was interrupted.
        TrainingError: the model cannot generate.
    """
    prompts = PromptBatch.of_tokens([row["input_ids"] for row in rows], tokenizer, base)
    options = {**objective.sampling, "use_cache": True}
    tokens = _generated(model, base, prompts, options, objective.max_completion_length, stop)
    return [_completion(row, answer, prompts) for row, answer in zip(rows, tokens, strict=True)]


def _generated(
    model: Any,
    base: Any,
    prompts: PromptBatch,
    options: Mapping[str, Any],
    most: int,
    stop: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, at most ``most``."""
    request = GenerationRequest(None, most, options, should_stop=stop)
    try:
        with evaluating(model), torch.no_grad():
            tokens, complete = generate_tokens(model, prompts, request)
    except Exception as error:
        if isinstance(error, NbpeftError) or is_out_of_memory(error):
            raise
        raise TrainingError(
            f"{type(base).__name__} cannot generate completions: {type(error).__name__}: {in_one_line(error):.200}"
        ) from error
    if not complete:
        raise KeyboardInterrupt  # generate_tokens swallowed it
    return tokens


def check_cache(model: Any, base: Any, row: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuses a model that continues a prompt differently with its cache: it would learn completions of another model.

    Args:
        model: the model in training.
        base: its base model.
        row: a tokenized row.
        tokenizer: its tokenizer.

    Raises:
        KeyboardInterrupt: the generation was interrupted.
        TrainingError: the tokens differ by more than rounding can explain, or the model cannot generate.
    """
    prompt = PromptBatch.of_tokens([row["input_ids"]], tokenizer, base)
    cached, plain = (_generated(model, base, prompt, {"use_cache": uses}, _TRIED_TOKENS)[0] for uses in (True, False))
    place = next((place for place, pair in enumerate(zip(cached, plain, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return
    parameter = next(iter(base.parameters()))
    ids = torch.tensor([[*row["input_ids"], *plain[:place]]], device=parameter.device)
    with evaluating(model), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].float()
    if float(logits[plain[place]] - logits[cached[place]]) > _LARGEST_GAP:
        raise TrainingError(
            f"{type(base).__name__} generates other tokens with its cache than without it, so that it would learn "
            "completions that are not its own: the model or the method of the adapter does not support generation"
        )


def _completion(row: Mapping[str, Any], tokens: Sequence[int], prompts: PromptBatch) -> Completion:
    end = next((place for place, token in enumerate(tokens) if token in prompts.ends), None)
    kept = tuple(tokens if end is None else tokens[: end + 1])
    return Completion(row, kept, str(prompts.tokenizer.decode(kept, skip_special_tokens=True)), end is not None)


def batches(
    completions: Sequence[Completion], advantages: Tensor, sizes: Sequence[int], collator: Collator, objective: Grpo
) -> list[dict[str, Any]]:
    """Batches of completions to learn, padded on the right.

    Args:
        completions: the completions of a step.
        advantages: the advantage of each, (completions,).
        sizes: the number of completions of each batch.
        collator: pads rows.
        objective: which completions are learned.
    """
    rows = [
        {**row.tokens(learned=row.ended or not objective.mask_truncated_completions), "advantages": advantage}
        for row, advantage in zip(completions, advantages.tolist(), strict=True)
    ]
    total = sum(label != IGNORED_LABEL for row in rows for label in row["labels"])
    share, first, found = torch.tensor([max(total, 1) / len(sizes), len(rows) / len(sizes)]), 0, []
    for place, size in enumerate(sizes):
        found.append({**collator(rows[first : first + size]), "share": share, "place": place})
        first += size
    return found
