"""Blend: a slider for each adapter and the answer of their weighted sum, which follows the sliders.

    slider ──> a moment's wait ──> worker thread ──> session.compare(blends=…) ──> one HTML widget

The exact sum is heard without a new adapter: every adapter runs with its own factor, for this answer
alone. What has to be computed first (TIES, DARE) is answered by the button, and saved by the other.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.blocks import card, dim, line
from nbpeft.display.html import to_html
from nbpeft.display.models import missing_model
from nbpeft.errors import NbpeftError
from nbpeft.session.results.comparing import Column, CompareResult
from nbpeft.state import SessionState
from nbpeft.widgets.answer_panel import AnswerPanel
from nbpeft.widgets.worker import Stopped

if TYPE_CHECKING:
    from nbpeft.widgets.blend_controls import BlendControls

EXACT = "exact"
DEBOUNCE = 0.35
"""Seconds that the sliders rest before an answer begins."""

AT_ZERO = "Every slider is at 0: move one."
SEED = 0
"""Of what DARE drops: the adapter that is saved is the one that was heard."""


class BlendPanel(AnswerPanel):
    """A slider an adapter, the answer of the blend beside the base model's, and a way to keep it.

    Args:
        session: Takes the commands, publishes the states.
        model_name: A model of the session; the current one by default.
        ui: How to show it; by default the richest that works here.
        tokenizer: A tokenizer, or a function that gives one; by default the one given last.
        prompt: To begin with.
        max_new_tokens: Longest answer to begin with.
        chat: Whether the prompt goes into the tokenizer's chat template, to begin with; see ``session.compare``.
    """

    kind: ClassVar[str] = "blend"

    def __init__(self, *arguments: Any, max_new_tokens: int = 48, **options: Any) -> None:
        super().__init__(*arguments, max_new_tokens=max_new_tokens, **options)
        self._base: tuple[tuple[str, int, bool | None], Column] | None = None

    def _build(self) -> Any:
        from nbpeft.widgets.blend_controls import BlendControls

        return BlendControls(self._command, self._prompt, self._tokens, self._chat)

    def _text(self) -> str:
        if self._result is None:
            return f"blend {self._name}: no answer yet."
        return f"blend {self._name}: {self._result.columns[-1].title}; {self._result.aside}."

    def _card(self, hint: str) -> str:
        model = self._model()
        if model is None:
            return to_html(card("blend", line(dim(missing_model(self._name))), line(dim(hint))))
        if self._result is None:
            names = ", ".join(item.name for item in model.adapters) or "none"
            return to_html(card("blend", line(dim(f"No answer yet. Adapters: {names}.")), line(dim(hint))))
        return to_html(card("blend", self._result.blocks(), line(dim(hint)), aside=self._result.aside))

    def _draw(self, state: SessionState) -> None:
        model = state.model(self._name)
        if model is None:
            self._base = None
        self._parts.draw(model, missing_model(self._name) if model is None else "")

    # Commands

    def _run(self, *command: Any) -> str:
        parts: BlendControls | None = self._parts
        if parts is None:
            return ""
        what = command[0]
        if what in ("moved", "form"):
            return self._moved(parts)
        if what == "run":
            self._ask(parts, delay=0.0)
        elif what == "stop":
            self._halt()
        elif what == "save":
            return self._save(parts)
        return ""

    def _moved(self, parts: BlendControls) -> str:
        """A slider or a setting moved: the exact sum is answered anew, others wait for the button."""
        if not parts.question.prompt:
            return ""
        if not parts.weights:
            self._halt()
            return AT_ZERO
        if parts.type == EXACT:
            self._ask(parts, delay=DEBOUNCE)
            return ""
        self._halt()
        return f"Answer computes {parts.type} for these weights; only the exact sum follows the sliders."

    def _ask(self, parts: BlendControls, *, delay: float) -> None:
        prompt, _ = self._asked()
        tokens, weights = parts.tokens, parts.weights
        _require(weights)
        known = self._base is not None and self._base[0] == (prompt, tokens, parts.form.chat)
        options: dict[str, Any] = {
            "include_base": not known,
            "max_new_tokens": tokens,
            "chat": parts.form.chat,
            "tokenizer": self._source(),
            "model": self._name,
        }
        kind, density = parts.type, parts.density
        self._begin()
        if kind == EXACT:
            options.update(adapters=[], blends=[weights])
            self._worker.submit(lambda stopped: self._answer(self._session.compare, (prompt,), options, stopped), delay)
        else:
            options.update(type=kind, density=density, seed=SEED)
            trial = self._session.try_combination
            self._worker.submit(lambda stopped: self._answer(trial, (weights, prompt), options, stopped), delay)

    def _answer(self, ask: Any, arguments: tuple[Any, ...], options: dict[str, Any], stopped: Stopped) -> None:
        """The worker's part."""
        key = (self._prompt, options["max_new_tokens"], options["chat"])

        def act() -> str:
            try:
                result = ask(*arguments, on_text=self._answered, should_stop=stopped, **options)
                if options["include_base"] and result.status == "finished":
                    self._base = (key, result.columns[0])
                if not self._worker.waiting:
                    self._answered(result)
                return " ".join(result.notes)
            finally:
                self._ended()

        self._guarded(act)

    def _answered(self, result: CompareResult) -> None:
        if len(result.columns) == 1 and self._base is not None:
            result = dataclasses.replace(result, columns=(self._base[1], *result.columns))
        self._result = result
        with self._lock:
            if self._parts is not None:
                self._parts.show(result)

    def _save(self, parts: BlendControls) -> str:
        name, weights = parts.name, parts.weights
        if not name:
            raise NbpeftError("Give the new adapter a name.")
        _require(weights)
        options: dict[str, Any] = {"rank": parts.rank} if parts.type == EXACT else {"density": parts.density}
        self._halt()
        self._worker.wait(5.0)
        made = self._session.combine(weights, as_name=name, type=parts.type, seed=SEED, model=self._name, **options)
        return str(made)


def _require(weights: dict[str, float]) -> None:
    if not weights:
        raise NbpeftError(AT_ZERO)
