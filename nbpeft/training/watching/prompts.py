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
        batch: the tokenized prompts.
        given: the argument ``sample`` of the training.
        wanted: the wanted answer to each prompt; empty if they are unknown.
        source: where the prompts come from; empty if they were given.
    """

    batch: PromptBatch
    given: str | Sequence[Prompt] | int
    wanted: tuple[str, ...] = ()
    source: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the user: where the prompts come from, and with which system prompt they are sent."""
        system = self.batch.system
        sent = f"sampled prompts have the system prompt {system!r:.80}" if system else ""
        return tuple(note for note in (self.source, sent) if note)
