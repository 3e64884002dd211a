"""What comparing gives: the answers of several adapters to the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nbpeft.display.blocks import Block, Box, Card, Columns, Text, card, line, notes
from nbpeft.display.differences import Runs, differences
from nbpeft.display.models import with_notes
from nbpeft.session.results.base import Result

BASE = "base"

Status = Literal["running", "finished", "stopped"]


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt.

    Attributes:
        text: without special tokens.
        token_count: tokens of it.
        ended: whether the model ended it.
        cut: whether it reached the greatest length before that.
    """

    text: str = ""
    token_count: int = 0
    ended: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Column:
    """What one adapter, one blend, or the base model answers.

    Attributes:
        title: ``base``, the adapter's name, or ``orders + pirate (0.7 / 0.3)``.
        weights: (adapter, weight) pairs; empty for the base model.
        answers: one for each prompt.
        row: what serves its rows of the batch; empty for a blend, which is answered apart.
    """

    title: str
    weights: tuple[tuple[str, float], ...] = ()
    answers: tuple[Answer, ...] = ()
    row: str = ""


@dataclass(frozen=True, repr=False)
class CompareResult(Result):
    """Answers to the same prompts, side by side.

    Attributes:
        model_name: the notebook variable of the model.
        prompts: as a person reads them.
        columns: the base model first, then adapters, then blends.
        seconds: how long all of it took.
        passes: how many generations: one for the base and all adapters, one more for each blend.
        status: ``running`` while answers come, ``stopped`` where they were ended early.
        form: ``chat template applied`` or ``chat template not applied``; empty where the tokenizer has none.
        notes: what a person should know.
    """

    model_name: str
    prompts: tuple[str, ...]
    columns: tuple[Column, ...]
    seconds: float = 0.0
    passes: int = 1
    status: Status = "finished"
    form: str = ""
    notes: tuple[str, ...] = ()

    @property
    def answers(self) -> dict[str, tuple[str, ...]]:
        """Column title -> the texts, one for each prompt."""
        return {column.title: tuple(answer.text for answer in column.answers) for column in self.columns}

    @property
    def token_count(self) -> int:
        """Tokens of all answers."""
        return sum(answer.token_count for column in self.columns for answer in column.answers)

    @property
    def aside(self) -> str:
        """``answered in 1.9 s, chat template not applied``."""
        batches = f" and {self.passes} batches" if self.passes > 1 else ""
        done = "stopped after" if self.status == "stopped" else "answered in"
        parts = [f"{done} {self.seconds:.1f} s{batches}", self.form]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        from nbpeft.display.text import columns

        blocks = []
        for number, prompt in enumerate(self.prompts):
            answers = columns([(column.title, _box(column, number).text) for column in self.columns])
            blocks.append(f"{' '.join(prompt.split())}\n{answers}")
        return with_notes("\n".join([*blocks, self.aside]), self.notes)

    def view(self, against: str | None = None) -> Card:
        """The answers side by side.

        Args:
            against: title of the column that the others are compared with; the first if left out.
        """
        return card(f"Answers of {self.model_name}", self.blocks(against), notes(self.notes), aside=self.aside)

    def blocks(self, against: str | None = None, *, shown: str = "") -> tuple[Block, ...]:
        """The prompts and answers without a frame.

        Args:
            against: title of the column that the others are compared with; the first if left out.
            shown: a prompt that can be read beside them already.
        """
        titles = [column.title for column in self.columns]
        reference = self.columns[titles.index(against) if against in titles else 0]
        found: list[Block] = []
        for number, prompt in enumerate(self.prompts):
            if prompt != shown:
                found.append(line(Text(prompt, "dim", wrap="as is")))
            marked_against = None if self.status == "running" else reference
            found.append(Columns(tuple(_box(column, number, marked_against) for column in self.columns)))
        return tuple(found)


def blend_title(weights: tuple[tuple[str, float], ...]) -> str:
    """``orders + pirate (0.7 / 0.3)``."""
    names = " + ".join(name for name, _ in weights)
    return f"{names} ({' / '.join(f'{weight:g}' for _, weight in weights)})"


def _box(column: Column, number: int, reference: Column | None = None) -> Box:
    """One answer, with what differs from that of the reference marked."""
    answer, aside = column.answers[number], ""
    runs: Runs = ((answer.text, False),)
    if reference is not None and reference is not column:
        runs, relation = differences(answer.text, reference.answers[number].text)
        aside = f"same as {reference.title}" if relation == "same" else relation
    ending = " …" if answer.cut else "(nothing)" if answer.ended and not answer.text else ""
    return Box(column.title, runs, aside, ending)
