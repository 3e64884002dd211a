"""Answers shown while they come, without a panel."""

from __future__ import annotations

from typing import Any

from nbpeft.widgets import LiveAnswers
from tests.widgets.answering import PROMPT, AnsweringSession
from tests.widgets.support import Output


def test_live_answers_are_one_output_that_empties_itself(outputs: list[Output]) -> None:
    session: Any = AnsweringSession()
    live = LiveAnswers(ui="html")
    options: dict[str, Any] = {"adapters": ["orders"], "max_new_tokens": 9, "tokenizer": None}
    session.compare(PROMPT, model="model", on_text=live.draw, should_stop=lambda: False, **options)
    (output,) = outputs
    assert len(output.bundles) == 10
    assert "Ana" in output.last["text/html"]
    live.close()
    assert output.last == {"text/html": "", "text/plain": ""}
    silent = LiveAnswers(ui="text")
    session.compare(PROMPT, model="model", on_text=silent.draw, should_stop=lambda: False, **options)
    silent.close()
    assert len(outputs) == 1
