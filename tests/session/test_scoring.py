"""Scores through the session: its tokenizer, its lock and its messages."""

from __future__ import annotations

from typing import Any

import pytest

from nbpeft.errors import AdapterError, ConfigError, UnknownAdapterError
from nbpeft.session import Session
from tests.char_tokenizer import CharTokenizer
from tests.scoring.support import ROWS, adapted


@pytest.fixture
def model() -> Any:
    return adapted()


@pytest.fixture
def session(model: Any) -> Session:
    session = Session()
    session.watch(model, name="model")
    return session


def test_the_session_scores_with_the_tokenizer_it_knows(session: Session, model: Any) -> None:
    with pytest.raises(ConfigError, match="a tokenizer is needed"):
        session.score(ROWS)
    session.ask("Hi", tokenizer=CharTokenizer(), max_new_tokens=1)
    result = session.score(ROWS, adapters="sql", max_new_tokens=2)
    assert (result.model_name, result.columns, result.status) == ("model", ("base", "sql"), "finished")
    assert model.active_adapters == ["sql"]


def test_the_session_is_busy_meanwhile_and_free_afterwards(session: Session) -> None:
    seen = []

    def own(answer: str, row: Any) -> bool:
        seen.append(session.state.busy)
        return True

    session.score(ROWS[:2], metric=own, tokenizer=CharTokenizer(), max_new_tokens=1)
    assert set(seen) == {"scoring"}
    assert not session.state.busy


def test_a_stop_may_be_requested_from_outside(session: Session) -> None:
    controls: list[Any] = []

    def own(answer: str, row: Any) -> bool:
        controls[0].request_stop()
        return True

    result = session.score(
        ROWS, metric=own, tokenizer=CharTokenizer(), max_new_tokens=2, batch_size=4, on_control=controls.append
    )
    assert (result.status, len(result.items)) == ("stopped", 4)


def test_what_cannot_be_scored_is_refused(session: Session) -> None:
    with pytest.raises(UnknownAdapterError, match="sqll"):
        session.score(ROWS, adapters=["sqll"], tokenizer=CharTokenizer())
    with pytest.raises(AdapterError, match="expected the name of an adapter or a list of names"):
        session.score(ROWS, adapters=3, tokenizer=CharTokenizer())
    with pytest.raises(AdapterError, match="expected a tokenizer of transformers"):
        session.score(ROWS, tokenizer=3)
    assert not session.state.busy
