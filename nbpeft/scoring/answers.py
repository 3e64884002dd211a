"""Answers to the rows: base and adapters in mixed batches, sorted by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from nbpeft.scoring.metrics import Metric
from nbpeft.scoring.rows import ScoredRow
from nbpeft.scoring.settings import Column, ScoreSettings, batches, in_parts, passes, serving_alone
from nbpeft.training.adapters.adapted_model import base_of
from nbpeft.training.data.encoding import decoded
from nbpeft.training.watching.generation import GenerationRequest, PromptBatch, generate_tokens, whole_characters

_USUAL_LIMIT = 256
_MARGIN = 8
"""Tokens beyond the longest reference, as other tokens may spell the same answer; as many again for white space."""
_AT_THE_START = frozenset(("exact", "startswith"))
"""Metrics for which only the beginning of an answer counts, up to the length of the reference."""


@dataclass(frozen=True)
class GivenAnswer:
    """One answer.

    Attributes:
        text: the text, without special tokens.
        cut: whether it reached the greatest length before it ended.
        finite: whether the logits of all its tokens are numbers.
    """

    text: str
    cut: bool = False
    finite: bool = True


Answered = tuple[int, int, GivenAnswer]
"""The index of a row, the index of a column, and its answer."""


def default_limit(rows: Sequence[ScoredRow], metrics: Sequence[Metric], *, stripped: bool) -> int:
    """The greatest number of new tokens if none is given.

    Args:
        rows: the rows.
        metrics: the metrics.
        stripped: whether white space before the answer is ignored.
    """
    if only_the_start_counts(metrics):
        return max(row.reference_count for row in rows) + (2 if stripped else 1) * _MARGIN
    return _USUAL_LIMIT


def only_the_start_counts(metrics: Sequence[Metric]) -> bool:
    """Whether only the beginning of an answer counts, up to the length of the reference."""
    return {metric.name for metric in metrics if metric.needs == "answers"} <= _AT_THE_START


def answer_rows(
    model: nn.Module,
    rows: Sequence[ScoredRow],
    columns: Sequence[Column],
    settings: ScoreSettings,
    *,
    tokenizer: Any,
    limit: int,
    ends: frozenset[int] = frozenset(),
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[list[Answered]]:
    """Generates the answers of all columns, and yields those of one batch after the other until it is stopped.

    With a temperature, the random numbers of a row depend on the seed and its number alone. They are the same for
    all columns, and in a batch as for the row alone.
    """
    lengths = [len(row.prompt_ids) for row in rows]
    size = settings.rows_together(len(columns))

    def answers_to(places: Sequence[int]) -> list[Answered] | None:
        found: list[Answered] = []
        for together in passes(columns):
            some, chosen = [rows[place] for place in places], [columns[number] for number in together]
            answers = _one_pass(
                model, some, chosen, settings, tokenizer=tokenizer, limit=limit, ends=ends, should_stop=should_stop
            )
            if answers is None:
                return None
            cells = [(place, column) for column in together for place in places]
            found += [(*cell, answer) for cell, answer in zip(cells, answers, strict=True)]
        return found

    for places in batches(lengths, lambda longest: size):
        found = in_parts(answers_to, places)
        if found is None:
            return
        yield found


def _one_pass(
    model: nn.Module,
    rows: Sequence[ScoredRow],
    columns: Sequence[Column],
    settings: ScoreSettings,
    *,
    tokenizer: Any,
    limit: int,
    ends: frozenset[int],
    should_stop: Callable[[], bool] | None,
) -> list[GivenAnswer] | None:
    """The answers of columns to a batch of rows, one column after the other; None if it was stopped."""
    prompts = [row.prompt_ids for _ in columns for row in rows]
    batch = PromptBatch.of_tokens(prompts, tokenizer, base_of(model))
    batch = replace(batch, ends=batch.ends | ends)
    watch = _Choosing(settings, [row.number for _ in columns for row in rows])
    # The cache is switched off in the config while a model with gradient checkpointing is trained.
    options = {"logits_processor": LogitsProcessorList([watch]), "use_cache": True}
    names = [column.row for column in columns for _ in rows] if columns[0].row else None
    request = GenerationRequest(names, limit, options, None, should_stop)
    if names is None:
        with serving_alone(model, columns[0]):
            tokens, complete = generate_tokens(model, batch, request)
    else:
        tokens, complete = generate_tokens(model, batch, request)
    if not complete:
        return None
    finite = watch.finite
    return [
        _answer(batch, prompt, given, limit, finite[place])
        for place, (prompt, given) in enumerate(zip(prompts, tokens, strict=True))
    ]


def _answer(batch: PromptBatch, prompt: Sequence[int], tokens: list[int], limit: int, finite: bool) -> GivenAnswer:
    end = next((place for place, token in enumerate(tokens) if token in batch.ends), None)
    text, is_cut = decoded(batch.tokenizer, prompt, tokens[:end]), end is None and len(tokens) >= limit
    return GivenAnswer(whole_characters(text) if is_cut else text, cut=is_cut, finite=finite)


class _Choosing(LogitsProcessor):
    """Samples each row's tokens with random numbers of its own, and notes rows whose logits are not numbers.

    The most likely token after adding Gumbel noise to the logits is a sample of their distribution, so that the
    greedy generation of transformers samples.
    """

    def __init__(self, settings: ScoreSettings, numbers: Sequence[int]) -> None:
        self._settings = settings
        self._generators = [_generator(settings.seed, number) for number in numbers] if settings.draws else []
        self._not_finite = torch.zeros(len(numbers), dtype=torch.bool)

    @property
    def finite(self) -> list[bool]:
        """Whether the logits of each row were numbers."""
        return [not bad for bad in self._not_finite.tolist()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the logits among which the greatest is chosen, (rows, vocabulary)."""
        self._not_finite = self._not_finite.to(scores.device) | scores.isnan().any(-1)
        if not self._settings.draws:
            return scores
        scores = scores.float() / float(self._settings.temperature or 1)
        if self._settings.top_p is not None:
            scores = _within(scores, self._settings.top_p)
        drawn = [torch.empty(scores.shape[-1]).exponential_(generator=one) for one in self._generators]
        return scores - torch.stack(drawn).log().to(scores.device)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def _within(scores: Tensor, top_p: float) -> Tensor:
    """Excludes the least likely tokens beyond a total probability."""
    ordered, order = scores.sort(descending=True, dim=-1)
    shares = ordered.softmax(-1)
    beyond = shares.cumsum(-1) - shares >= top_p
    return scores.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
