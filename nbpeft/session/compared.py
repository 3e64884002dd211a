"""What comparing gives: the answers of several adapters to the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Literal

from nbpeft.session import render, side_by_side
from nbpeft.session.describe import with_notes
from nbpeft.session.results import Result

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
        form: ``sent as plain text`` or ``sent as a chat message``; empty where there is no choice.
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
        """``one batched pass · 1.9 s · sent as plain text``."""
        passes = "one batched pass" if self.passes == 1 else f"{self.passes} passes"
        parts = [passes, f"{self.seconds:.1f} s", *([self.form] if self.form else [])]
        return " · ".join(parts if self.status == "finished" else [*parts, self.status])

    def __str__(self) -> str:
        titles = [column.title for column in self.columns]
        blocks = []
        for number, prompt in enumerate(self.prompts):
            texts = [_plain(column.answers[number]) for column in self.columns]
            blocks.append(f"{' '.join(prompt.split())}\n{side_by_side.text_rows(titles, texts)}")
        return with_notes("\n".join([*blocks, self.aside]), self.notes)

    def html(self, against: str | None = None, *, title: str = "compare") -> str:
        """The answers as a card.

        Args:
            against: title of the column that differences are marked against; the first if left out.
            title: of the card.
        """
        return render.card(title, self.body(against), render.notes(self.notes), aside=self.aside)

    def body(self, against: str | None = None, *, asked: str = "") -> str:
        """The prompts and answers without a frame.

        Args:
            against: title of the column that differences are marked against; the first if left out.
            asked: a prompt that can be read beside them already.
        """
        titles = [column.title for column in self.columns]
        place = titles.index(against) if against in titles else 0
        blocks = []
        for number, prompt in enumerate(self.prompts):
            bodies, asides = [], []
            for column in self.columns:
                marks = self.status != "running" and column is not self.columns[place]
                reference = self.columns[place].answers[number] if marks else None
                body, aside = _cell(column.answers[number], reference, titles[place])
                bodies.append(body)
                asides.append(aside)
            words = f'<span style="white-space:pre-wrap;overflow-wrap:anywhere">{render.dim(prompt)}</span>'
            head = render.line(words) if prompt != asked else ""
            blocks.append(head + side_by_side.columns(titles, bodies, asides))
        return "".join(blocks)

    def _html(self) -> str:
        return self.html()


def blend_title(weights: tuple[tuple[str, float], ...]) -> str:
    """``orders + pirate (0.7 / 0.3)``."""
    names = " + ".join(name for name, _ in weights)
    return f"{names} ({' / '.join(f'{weight:g}' for _, weight in weights)})"


def _plain(answer: Answer) -> str:
    return f"{answer.text} …" if answer.cut else answer.text or "(nothing)"


def _cell(answer: Answer, reference: Answer | None, name: str) -> tuple[str, str]:
    """The text of an answer as HTML, and what to say beside its title."""
    text, aside = side_by_side.marked(answer.text, reference.text) if reference else (escape(answer.text), "")
    if answer.cut:
        text += render.dim(" …")
    elif answer.ended and not answer.text:
        text = render.dim("(nothing)")
    return text, f"same as {name}" if aside == "same" else aside
