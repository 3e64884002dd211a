"""The result of asking: one answer, with the earlier turns of the conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbpeft.display.blocks import Block, Card, Text, card, dim, line, notes
from nbpeft.display.numbers import plural
from nbpeft.session.results.base import NotedResult
from nbpeft.session.results.comparing import WAITING, Answer, Status, Turn, system_block, system_line
from nbpeft.session.sampling import shown_settings


@dataclass(frozen=True, repr=False)
class AskResult(NotedResult):
    """One answer.

    Attributes:
        model_name: the notebook variable of the model.
        adapter: what answered: an adapter, several joined by `` + ``, or ``base``.
        prompt: the prompt as the user wrote it.
        answer: the answer.
        seconds: duration in seconds.
        settings: temperature, top-p and seed for sampling; empty for greedy decoding.
        turns: (prompt, answer) of the earlier turns of a continued conversation.
        status: ``running`` while it is generated, ``waiting`` before that, ``stopped`` if it was ended early.
        form: whether the chat template was applied; empty if the tokenizer has none.
        system: the system prompt; empty if there is none.
    """

    model_name: str
    adapter: str
    prompt: str
    answer: Answer = field(default_factory=Answer)
    seconds: float = 0.0
    settings: Mapping[str, float] = field(default_factory=dict, hash=False)
    turns: tuple[Turn, ...] = ()
    status: Status = "finished"
    form: str = ""
    system: str = ""

    @property
    def text(self) -> str:
        """The answer, without special tokens."""
        return self.answer.text

    @property
    def token_count(self) -> int:
        """Number of tokens of the answer."""
        return self.answer.token_count

    @property
    def tokens_per_second(self) -> float:
        """Speed in tokens per second, including the time for the prompt."""
        return self.token_count / self.seconds if self.seconds > 0 else 0.0

    @property
    def aside(self) -> str:
        """``24 tokens, 31 tokens/s, temperature 0.7, seed 5``."""
        if self.status == "waiting":
            return WAITING
        speed = f"{self.tokens_per_second:.3g} tokens/s"
        parts = [plural(self.token_count, "token"), speed, shown_settings(self.settings) or "greedy", self.form]
        return ", ".join(part for part in (*parts, self.status if self.status == "stopped" else "") if part)

    def _what(self) -> str:
        parts = [part for turn in (*self.turns, (self.prompt, self.text + self._ending)) for part in turn]
        words = "\n".join([f"{'>' if not index % 2 else ' '} {text}" for index, text in enumerate(parts)])
        words = f"{system_line(self.system)}\n{words}" if self.system else words
        return f"{words}\n{self.adapter}: {self.aside}"

    def view(self) -> Card:
        blocks: list[Block] = []
        if self.system:
            blocks.append(system_block(system_line(self.system)))
        for prompt, text, ending in (*((*turn, "") for turn in self.turns), (self.prompt, self.text, self._ending)):
            blocks.append(line(Text(prompt, "dim", wrap="as is")))
            blocks.append(line(Text(text, wrap="as is"), dim(ending)))
        return card(f"{self.adapter} answers", tuple(blocks), notes(self.notes), aside=self.aside)

    @property
    def _ending(self) -> str:
        if self.answer.cut or self.status == "running":
            return " …"
        return "(nothing)" if self.status in ("finished", "stopped") and not self.text else ""
