"""The result of comparing: the answers of several adapters to the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nbpeft.display.blocks import Block, Box, Card, Columns, Line, Text, card, line, notes
from nbpeft.display.differences import Runs, differences
from nbpeft.errors import cut
from nbpeft.session.results.base import NotedResult
from nbpeft.session.sampling import shown_settings
from nbpeft.state import Answer as Answer

if TYPE_CHECKING:
    from nbpeft.training.watching.generation import Conversation

_LONGEST_SYSTEM = 300
"""Most characters of a system prompt in a card."""
BASE = "base"
WAITING = "waiting for the training step to end …"

Status = Literal["waiting", "running", "finished", "stopped"]

Turn = tuple[str, str]
"""A prompt and its answer."""


@dataclass(frozen=True)
class Column:
    """The answers of one adapter, one blend, or the base model.

    Attributes:
        title: ``base``, the adapter's name, or ``orders + pirate (0.7 / 0.3)``.
        weights: (adapter, weight) pairs; empty for the base model.
        answers: one per prompt.
        row: name of the adapter for its rows of the batch; empty for a blend, which needs a generation of its own.
        turns: the earlier turns of a continued conversation.
        form: ``chat template applied`` or ``chat template not applied``; empty if the tokenizer has none.
        system: the system prompt; empty if there is none.
        chat: whether the chat template was applied.
        conversation: the messages of a single prompt and its answer, if the chat template was applied.
    """

    title: str
    weights: tuple[tuple[str, float], ...] = ()
    answers: tuple[Answer, ...] = ()
    row: str = ""
    turns: tuple[Turn, ...] = ()
    form: str = ""
    system: str = ""
    chat: bool = False
    conversation: Conversation = field(default=(), repr=False, hash=False)


@dataclass(frozen=True, repr=False)
class CompareResult(NotedResult):
    """Answers to the same prompts, side by side.

    Attributes:
        model_name: the notebook variable of the model.
        prompts: the prompts as the user wrote them.
        columns: the base model first, then adapters, then blends.
        seconds: total time in seconds.
        passes: number of generations: one for the base and all adapters, and one for each blend.
        status: ``running`` while answers are generated, ``waiting`` before that for a training in the background,
            ``stopped`` if they were ended early.
        settings: temperature, top-p and seed for sampling; empty for greedy decoding.
    """

    model_name: str
    prompts: tuple[str, ...]
    columns: tuple[Column, ...]
    seconds: float = 0.0
    passes: int = 1
    status: Status = "finished"
    settings: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def form(self) -> str:
        """Whether the chat template was applied: for all columns, or by column if they differ."""
        forms = {column.form: self._titles(form=column.form) for column in self.columns}
        return next(iter(forms)) if len(forms) == 1 else "; ".join(f"{form} for {who}" for form, who in forms.items())

    @property
    def chat(self) -> bool:
        """Whether the chat template was applied in every column, so that the conversation can be continued."""
        return all(column.chat for column in self.columns)

    @property
    def systems(self) -> tuple[str, ...]:
        """A line with the system prompt, or one for each if the columns have different ones; empty without any."""
        found = dict.fromkeys(column.system for column in self.columns)
        if len(found) == 1:
            return tuple(system_line(system) for system in found if system)
        return tuple(system_line(system, self._titles(system=system)) for system in found)

    def _titles(self, **shared: str) -> str:
        """Returns the titles of the columns with these values."""
        chosen = (c for c in self.columns if all(getattr(c, name) == value for name, value in shared.items()))
        return ", ".join(column.title for column in chosen)

    @property
    def is_coming(self) -> bool:
        """Whether answers are still being generated."""
        return self.status in ("waiting", "running")

    @property
    def answers(self) -> dict[str, tuple[str, ...]]:
        """Column title -> the texts, one per prompt."""
        return {column.title: tuple(answer.text for answer in column.answers) for column in self.columns}

    @property
    def token_count(self) -> int:
        """Number of tokens of all answers."""
        return sum(answer.token_count for column in self.columns for answer in column.answers)

    @property
    def aside(self) -> str:
        """``answered in 1.9 s, temperature 0.7, seed 5, chat template not applied``."""
        if self.status == "waiting":
            return WAITING
        batches = f" and {self.passes} batches" if self.passes > 1 else ""
        done = "stopped after" if self.status == "stopped" else "answered in"
        parts = [f"{done} {self.seconds:.1f} s{batches}", shown_settings(self.settings), self.form]
        return ", ".join(part for part in parts if part)

    def _what(self) -> str:
        from nbpeft.display.text import columns

        blocks = list(self.systems)
        for number, prompt in enumerate(self.prompts):
            boxes = [_box(column, number, self._reference()) for column in self.columns]
            answers = columns([(box.title, box.plain, box.aside) for box in boxes])
            blocks.append(f"{' '.join(prompt.split())}\n{answers}")
        return "\n".join([*blocks, self.aside])

    def view(self, against: str | None = None) -> Card:
        """Shows the answers side by side.

        Args:
            against: title of the column with which the others are compared; None for the first.
        """
        return card(f"Answers of {self.model_name}", self.blocks(against), notes(self.notes), aside=self.aside)

    def blocks(self, against: str | None = None, *, shown: str = "") -> tuple[Block, ...]:
        """Shows the prompts and answers without a frame.

        Args:
            against: title of the column with which the others are compared; None for the first.
            shown: a prompt that is already displayed elsewhere and is left out.
        """
        reference = self._reference(against)
        blocks: list[Block] = [system_block(text) for text in self.systems]
        blocks += self._earlier()
        for number, prompt in enumerate(self.prompts):
            if prompt != shown:
                blocks.append(line(Text(prompt, "dim", wrap="as is")))
            blocks.append(Columns(tuple(_box(column, number, reference) for column in self.columns)))
        return tuple(blocks)

    def _reference(self, against: str | None = None) -> Column | None:
        """Returns the column with which others are compared; None while answers are generated."""
        titles = [column.title for column in self.columns]
        return None if self.is_coming else self.columns[titles.index(against) if against in titles else 0]

    def _earlier(self) -> Iterator[Block]:
        """Yields the earlier turns of a continued conversation."""
        for back in range(max(len(column.turns) for column in self.columns), 0, -1):
            turns = [column.turns[-back] if len(column.turns) >= back else ("", "") for column in self.columns]
            yield line(Text(next(prompt for prompt, _ in turns if prompt), "dim", wrap="as is"))
            boxes = zip(self.columns, turns, strict=True)
            yield Columns(tuple(Box(column.title, ((answer, False),)) for column, (_, answer) in boxes))


def system_line(system: str, who: str = "") -> str:
    """Returns a line that shows a system prompt, and who was asked with it unless that is clear."""
    label = f"{'system prompt' if system else 'no system prompt'}{' of ' if who else ''}{who}"
    return f"{label}: {' '.join(system.split())}" if system else label


def system_block(text: str) -> Line:
    """Returns a line of ``system_line`` for a card; a long one is cut and is shown as a whole on hover."""
    return line(Text(cut(text, _LONGEST_SYSTEM), "dim", tooltip=text))


def blend_title(weights: tuple[tuple[str, float], ...]) -> str:
    """Returns e.g. ``orders + pirate (0.7 / 0.3)``."""
    names = " + ".join(name for name, _ in weights)
    return f"{names} ({' / '.join(f'{weight:g}' for _, weight in weights)})"


def _box(column: Column, number: int, reference: Column | None = None) -> Box:
    """Returns one answer, with the differences from the reference's answer marked."""
    answer, aside = column.answers[number], ""
    runs: Runs = ((answer.text, False),)
    if reference is not None and reference is not column:
        runs, relation = differences(answer.text, reference.answers[number].text)
        aside = f"same as {reference.title}" if relation == "same" else relation
    ending = " …" if answer.cut else "(nothing)" if answer.ended and not answer.text else ""
    return Box(column.title, runs, aside, ending)
