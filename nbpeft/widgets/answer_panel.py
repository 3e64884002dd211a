"""The base of the panels in which adapters answer: a prompt, and a worker thread that generates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import Block, card, dim, line
from nbpeft.display.models import missing_model
from nbpeft.errors import NbpeftError
from nbpeft.state import ModelState
from nbpeft.widgets.environment import Ui
from nbpeft.widgets.panel import SessionPanel, WorkerPanel
from nbpeft.widgets.worker import Stopped

if TYPE_CHECKING:
    from nbpeft.session import Session
    from nbpeft.session.results.comparing import CompareResult

NOTHING_YET = "No answers yet."

TokenizerSource = Callable[[], Any]
"""Called when a prompt is read; returns the tokenizer, or None."""


class AnswerPanel(WorkerPanel, SessionPanel):
    """A panel whose answers are generated in a worker thread, so that the kernel stays free.

    Attributes:
        heading: Its title, up to the name of the model.
        result: The latest answers; None before the first.

    Args:
        session: See ``SessionPanel``, also for the next two.
        model_name: A model of the session.
        ui: How to show it.
        tokenizer: A tokenizer, or a function that returns one when a prompt is read; by default the
            one that the session used last.
        prompt: The initial prompt.
        max_new_tokens: The initial limit of an answer, in tokens.
        chat: The initial choice whether to apply the tokenizer's chat template; see ``session.compare``.
        system: The initial system prompt, empty for none; None for that of each adapter's training rows.
    """

    heading: ClassVar[str]

    def __init__(
        self,
        session: Session,
        model_name: str | None = None,
        *,
        ui: Ui = "auto",
        tokenizer: Any = None,
        prompt: str = "",
        max_new_tokens: int = 64,
        chat: bool | None = None,
        system: str | None = None,
    ) -> None:
        super().__init__(session, model_name, ui)
        self._prompt = prompt
        self._tokens = max_new_tokens
        self._chat = chat
        self._system = system
        self._source: TokenizerSource = (
            tokenizer if callable(tokenizer) and not hasattr(tokenizer, "decode") else (lambda: tokenizer)
        )
        self.result: CompareResult | None = None

    @property
    def prompt(self) -> str:
        """The text in the prompt box, or else the last prompt that was sent."""
        with self._lock:
            written = str(self._parts.question.prompt) if self._parts is not None else ""
            return written or self._prompt

    def _asked(self) -> tuple[str, ModelState]:
        """The prompt in the box and the model that answers it."""
        prompt, model = str(self._parts.question.prompt), self._model()
        if not prompt:
            raise NbpeftError("Write a prompt first.")
        if model is None:
            raise NbpeftError(missing_model(self._name))
        self._prompt = prompt
        return prompt, model

    def _text(self) -> str:
        if self.result is None:
            return f"{self.kind} {self._name}: {NOTHING_YET}"
        return f"{self.kind} {self._name}: {self._answered_by(self.result)}; {self.result.aside}."

    def _answered_by(self, result: CompareResult) -> str:
        """The columns of a result as text."""
        return ", ".join(column.title for column in result.columns)

    def _card(self, hint: str) -> Block:
        result, model = self.result, self._model()
        if result is not None:
            return card(self._title, result.blocks(), line(dim(hint)), aside=result.aside)
        names = ", ".join(item.name for item in model.adapters) if model is not None else ""
        empty = missing_model(self._name) if model is None else f"{NOTHING_YET} Adapters: {names or 'none'}."
        return card(self._title, line(dim(empty)), line(dim(hint)))

    @property
    def _title(self) -> str:
        """The heading and the name of the model."""
        return " ".join(part for part in (self.heading, self._name) if part)

    def _submit(self, ask: Callable[..., CompareResult], tokens: int, delay: float = 0.0) -> None:
        """Starts answers in the worker thread, after ``delay`` seconds in which a newer prompt may replace this one."""
        self._parts.question.running(True)
        self._parts.frame.head("answering …", running=True)
        options = {"model": self._name, "tokenizer": self._source(), "chat": self._parts.form.chat}
        options |= {"system": self._parts.system.system, "max_new_tokens": tokens}
        self._worker.submit(lambda stopped: self._guarded(lambda: self._answer(ask, options, stopped)), delay)

    def _answer(self, ask: Callable[..., CompareResult], options: dict[str, Any], stopped: Stopped) -> str:
        """Runs in the worker thread; returns the notes about the answers."""
        try:
            result = ask(on_text=self._answered, should_stop=stopped, **options)
            if not self._worker.waiting:
                self._answered(result)
            return " ".join(result.notes)
        finally:
            self._ended()

    def _answered(self, result: CompareResult) -> None:
        """Shows the answers so far."""
        self.result = result
        with self._lock:
            if self._parts is not None:
                self._parts.show(result)
            self._changed()

    def _ended(self) -> None:
        """Shows that no answer is being generated any more; the reason of a failure is shown below."""
        with self._lock:
            if self._parts is not None and not self._worker.waiting:
                result = self.result
                self._parts.question.running(False)
                self._parts.frame.head("" if result is None or result.status == "running" else result.aside)

    def _halt(self) -> None:
        """Stops the current answer; what was generated so far stays."""
        if self._worker.stop():
            self._ended()
