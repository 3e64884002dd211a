"""The prompts that are answered during a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nbpeft.training.watching.generation import Prompt, PromptBatch

MOST_PROMPTS = 8


@dataclass(frozen=True)
class SamplePrompts:
    """Prompts to answer during a run.

    Attributes:
        batch: the tokenised prompts.
        given: the argument ``sample`` of the training.
        wanted: the wanted answer to each prompt; empty if they are unknown.
        note: where the prompts come from; empty if they were given.
    """

    batch: PromptBatch
    given: str | Sequence[Prompt] | int
    wanted: tuple[str, ...] = ()
    note: str = ""
