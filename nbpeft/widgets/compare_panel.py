"""Compare: a prompt, and what the base model and the adapters answer, side by side while it comes.

click ──> worker thread ──> session.compare ── answers so far ──> one HTML widget
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from nbpeft.display.blocks import dim, line
from nbpeft.display.html import to_html
from nbpeft.display.models import missing_model
from nbpeft.session.results.comparing import BASE, CompareResult
from nbpeft.state import ModelState, SessionState
from nbpeft.widgets.answer_panel import AnswerPanel
from nbpeft.widgets.lifetime import weakly


class ComparePanel(AnswerPanel):
    """A prompt box, the adapters as columns, and the words marked in which answers differ; see ``AnswerPanel``."""

    kind: ClassVar[str] = "compare"
    heading: ClassVar[str] = "Compare answers of"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._left_out: set[str] = set()

    def _build(self) -> Any:
        return _Parts(self._title, self._command, self._prompt, self._tokens, self._chat)

    def _run(self, *command: Any) -> str:
        parts = self._parts
        if parts is None:
            return ""
        what = command[0]
        if what == "pick":
            self._left_out ^= {command[1]}
            self._draw(self._session.state)
        elif what == "stop":
            self._halt()
        elif what == "against":
            self._show()
        elif what == "run":
            self._ask(parts)
        return ""

    def _ask(self, parts: _Parts) -> None:
        prompt, model = self._asked()
        names = [item.name for item in model.adapters if item.name not in self._left_out]
        include_base = BASE not in self._left_out
        ask = functools.partial(self._session.compare, prompt, adapters=names, include_base=include_base)
        self._submit(ask, parts.tokens)

    def _show(self) -> None:
        if self._result is not None:
            self._answered(self._result)

    def _draw(self, state: SessionState) -> None:
        self._parts.draw(state.model(self._name), self._name, self._left_out)


class _Parts:
    """The widgets of the panel."""

    def __init__(self, title: str, command: Any, prompt: str, tokens: int, chat: bool | None) -> None:
        import ipywidgets

        from nbpeft.widgets import controls as parts

        self.question = parts.Question(command, prompt, "Compare")
        self._picks = parts.ToggleRow(command, "chips")
        self._tokens = parts.tokens_field(tokens)
        self.form = parts.PromptForm(command, chat)
        self._against = parts.labelled("diff against", ipywidgets.Dropdown(options=[BASE], value=BASE), 124)
        self._against.observe(weakly(command, "against"), names="value")
        settings = parts.settings_row(self._tokens, self.form.box, self._against)
        self.frame = parts.Frame(title, self.question.box, self._picks.box, settings)
        self.root, self.message = self.frame.root, self.frame.message

    @property
    def tokens(self) -> int:
        """Longest answer."""
        return int(self._tokens.value)

    def draw(self, model: ModelState | None, name: str | None, left_out: set[str]) -> None:
        """Shows which columns there are."""
        names = [BASE, *(item.name for item in model.adapters)] if model is not None else []
        picks: dict[tuple[str, ...], tuple[str, str]]
        picks = {("pick", item): (item, f"Answer with {item}, or not") for item in names}
        self._picks.draw(picks, [("pick", item) for item in names if item not in left_out])
        if model is None:
            self.frame.answers.value = to_html(line(dim(missing_model(name))))

    def show(self, result: CompareResult) -> None:
        """Shows answers, with what differs from the chosen column marked."""
        titles = [column.title for column in result.columns]
        if list(self._against.options) != titles:
            chosen = self._against.value
            self._against.options = titles
            self._against.value = chosen if chosen in titles else titles[0]
        self._against.layout.display = None if len(titles) > 2 else "none"
        running = result.status == "running"
        self.frame.head("answering …" if running else result.aside, running=running)
        self.frame.answers.value = to_html(result.blocks(self._against.value, shown=self.question.prompt))
