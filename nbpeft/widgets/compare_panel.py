"""Compare: a prompt, and the answers of the base model and the adapters, side by side as they are generated.

If the chat template is applied, the next prompt continues the conversation in every column.

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
    """A prompt box, the adapters as columns, and the differing words of their answers marked; see ``AnswerPanel``."""

    kind: ClassVar[str] = "compare"
    session_method: ClassVar[str] = "compare"
    heading: ClassVar[str] = "Compare answers of"

    def __init__(
        self,
        *arguments: Any,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._left_out: set[str] = set()
        self._sampling = (temperature, top_p, seed)

    def _build(self) -> Any:
        return _Parts(self._title, self._command, self._prompt, self._tokens, self._chat, self._system, self._sampling)

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
        elif what == "new":
            self._new_conversation(parts)
        elif what == "run":
            self._ask(parts)
        return ""

    def _ask(self, parts: _Parts) -> None:
        prompt, model = self._asked()
        names = [item.name for item in model.adapters if item.name not in self._left_out]
        include_base = BASE not in self._left_out
        settings = parts.sampling.settings
        previous = self.result
        if previous is not None and previous.chat and not previous.is_coming and parts.form.chat is not False:
            settings["after"] = previous
        ask = functools.partial(self._session.compare, prompt, adapters=names, include_base=include_base, **settings)
        self._submit(ask, parts.tokens)

    def _new_conversation(self, parts: _Parts) -> None:
        """Starts a new conversation."""
        with self._lock:
            self.result = None
            parts.clear()
            self._changed()

    def _ended(self) -> None:
        super()._ended()
        with self._lock:
            result = self.result
            if self._parts is not None and result is not None and result.chat and not result.is_coming:
                self._parts.next_prompt(result)

    def _show(self) -> None:
        if self.result is not None:
            self._answered(self.result)

    def _draw(self, state: SessionState) -> None:
        self._parts.draw(state.model(self._name), self._name, self._left_out)


class _Parts:
    """The widgets of the panel."""

    def __init__(
        self,
        title: str,
        command: Any,
        prompt: str,
        tokens: int,
        chat: bool | None,
        system: str | None,
        sampling: tuple[float | None, float | None, int | None],
    ) -> None:
        import ipywidgets

        from nbpeft.widgets import controls as parts

        self.question = parts.Question(command, prompt, "Send")
        self.system = parts.SystemField(command, system)
        self._picks = parts.ToggleRow(command, "chips", margin="0 0 10px 0")
        self._tokens = parts.tokens_field(tokens)
        self.sampling = parts.SamplingFields(*sampling)
        self.form = parts.PromptForm(command, chat)
        self._against = parts.labelled("diff against", ipywidgets.Dropdown(options=[BASE], value=BASE), 124)
        self._against.observe(weakly(command, "against"), names="value")
        words = "Start a new conversation in every column"
        self._new = parts.button("New conversation", words, weakly(command, "new"), hides=True)
        self._new.layout.display = "none"
        settings = parts.settings_row(self._tokens, *self.sampling.boxes, self.form.box, self._against, self._new)
        self.frame = parts.Frame(title, self.question.box, self.system.box, self._picks.box, settings)
        self.root, self.message = self.frame.root, self.frame.message

    @property
    def tokens(self) -> int:
        """The limit of an answer, in tokens."""
        return int(self._tokens.value)

    def clear(self) -> None:
        """Shows the panel without answers, as at the start."""
        self._new.layout.display = "none"
        self.question.next("A prompt")
        self.frame.head("")
        self.frame.answers.value = ""

    def next_prompt(self, result: CompareResult) -> None:
        """Clears the prompt box for the next turn of a conversation, unless the prompt was edited meanwhile."""
        self._new.layout.display = None
        if self.question.prompt == result.prompts[0].strip():
            self.question.next("Next message")
            self.show(result)

    def draw(self, model: ModelState | None, name: str | None, left_out: set[str]) -> None:
        """Shows a button for each column; those in ``left_out`` are switched off."""
        self.system.draw(() if model is None else model.adapters)
        names = [BASE, *(item.name for item in model.adapters)] if model is not None else []
        picks: dict[tuple[str, ...], tuple[str, str]]
        picks = {("pick", item): (item, f"Include or exclude {item}") for item in names}
        self._picks.draw(picks, [("pick", item) for item in names if item not in left_out])
        if model is None:
            self.frame.answers.value = to_html(line(dim(missing_model(name))))

    def show(self, result: CompareResult) -> None:
        """Shows answers, with the words marked that differ from the chosen column."""
        titles = [column.title for column in result.columns]
        if list(self._against.options) != titles:
            chosen = self._against.value
            self._against.options = titles
            self._against.value = chosen if chosen in titles else titles[0]
        self._against.layout.display = None if len(titles) > 2 else "none"
        running = result.status == "running"
        self.frame.head("answering …" if running else result.aside, running=result.is_coming)
        self.frame.answers.value = to_html(result.blocks(self._against.value, shown=self.question.prompt))
