"""Blend: a slider for each adapter, and the answer of their weighted sum, updated as the sliders move.

    slider ──> debounce ──> worker thread ──> session.compare(blends=…) ──> one HTML widget

The exact sum needs no new adapter: for this answer each adapter's output is multiplied by its weight. Combinations that
have to be computed first (TIES, DARE) are answered by the button "Answer" only; "Save as adapter" stores the blend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from nbpeft.display.models import missing_model
from nbpeft.errors import NbpeftError
from nbpeft.session.results.comparing import Column, CompareResult
from nbpeft.state import SessionState
from nbpeft.widgets.answer_panel import AnswerPanel

if TYPE_CHECKING:
    from nbpeft.widgets.blend_controls import BlendControls

EXACT = "exact"
DEBOUNCE = 0.35
"""Seconds without a movement after which an answer begins."""

AT_ZERO = "Every slider is at 0: move one."
SEED = 0
"""Seed of the entries that DARE drops, so that the saved adapter is the one that answered."""


class BlendPanel(AnswerPanel):
    """A slider for each adapter, the blend's answer next to the base model's, and a button that saves the blend.

    See ``AnswerPanel`` for the arguments.
    """

    kind: ClassVar[str] = "blend"
    session_method: ClassVar[str] = "try_combination"
    heading: ClassVar[str] = "Blend adapters of"

    def __init__(self, *arguments: Any, max_new_tokens: int = 48, **options: Any) -> None:
        super().__init__(*arguments, max_new_tokens=max_new_tokens, **options)
        self._base: tuple[tuple[str, int, bool | None, str | None], Column] | None = None

    def _build(self) -> Any:
        from nbpeft.widgets.blend_controls import BlendControls

        return BlendControls(self._title, self._command, self._prompt, self._tokens, self._chat, self._system)

    def _answered_by(self, result: CompareResult) -> str:
        return result.columns[-1].title

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
        """A slider or a setting changed: answers again for the exact sum; other types wait for the button."""
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
        weights = parts.weights
        _require(weights)
        key = (prompt, parts.tokens, parts.form.chat, parts.system.system)
        known = self._base is not None and self._base[0] == key
        command: Callable[..., CompareResult]
        if parts.type == EXACT:
            command = functools.partial(self._session.compare, prompt, adapters=[], blend=[weights])
        else:
            command = functools.partial(
                self._session.try_combination, weights, prompt, type=parts.type, density=parts.density, seed=SEED
            )

        def ask(**options: Any) -> CompareResult:
            result = command(include_base=not known, **options)
            if not known and result.status == "finished":
                self._base = (key, result.columns[0])
            return result

        self._submit(ask, parts.tokens, delay)

    def _answered(self, result: CompareResult) -> None:
        if len(result.columns) == 1 and self._base is not None:
            result = dataclasses.replace(result, columns=(self._base[1], *result.columns))
        super()._answered(result)

    def _save(self, parts: BlendControls) -> str:
        name, weights = parts.name, parts.weights
        if not name:
            raise NbpeftError("Give the new adapter a name.")
        _require(weights)
        options: dict[str, Any] = {"r": parts.rank} if parts.type == EXACT else {"density": parts.density}
        self._halt()
        self._worker.wait(5.0)
        combined = self._session.combine(weights, name=name, type=parts.type, seed=SEED, model=self._name, **options)
        return str(combined)


def _require(weights: dict[str, float]) -> None:
    if not weights:
        raise NbpeftError(AT_ZERO)
