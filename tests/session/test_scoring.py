"""Scores through the session: its tokenizer, its lock and its messages."""

from __future__ import annotations

from typing import Any

import pytest

from nbpeft.errors import AdapterError, ConfigError, UnknownAdapterError
from nbpeft.session import Session
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close
from tests.scoring.support import ROWS, adapted


@pytest.fixture
def model() -> Any:
    return adapted()


@pytest.fixture
def session(model: Any) -> Session:
    session = Session()
    session.register(model, name="model")
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
    asked: list[int] = []

    def own(answer: str, row: Any) -> bool:
        if len(asked) > 0:  # the first call is on a reference, before anything is computed
            controls[0].request_stop()
        asked.append(1)
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


def learn(session: Session, rows: Any, eval_data: Any, adapter: str = "sql", **options: Any) -> Any:
    given = {"tokenizer": CharTokenizer(), "max_steps": 1, "keep": False, "report_to": "none", **options}
    return session.train("model", rows, eval_data, adapter=adapter, **given)


def scored(session: Session, rows: Any = ROWS, **options: Any) -> Any:
    return session.score(rows, held_out=True, tokenizer=CharTokenizer(), **{"metric": "loss", **options})


def test_the_rows_that_were_held_out_are_scored_alone(session: Session) -> None:
    result = learn(session, ROWS, 0.3)
    assert len(result.held_out) == 4
    found = scored(session, ROWS, adapters="sql", include_base=False)
    assert tuple(item.number for item in found.items) == result.held_out
    assert_close(found.scores["sql"].value, result.eval_loss)
    assert found.notes[0] == "4 of 12 rows, those that were held out from the training"
    # adapters that were not trained learned nothing
    assert scored(session, ROWS).columns == ("base", "sql", "chat")


def test_rows_that_an_earlier_training_learned_are_not_held_out(session: Session) -> None:
    first, second = ({*learn(session, ROWS, 8, seed=seed).held_out} for seed in (1, 2))
    assert first != second and first & second
    found = scored(session, ROWS, adapters="sql")
    assert {item.number for item in found.items} == first & second
    learn(session, ROWS, None)
    with pytest.raises(AdapterError, match="no row was held out from all trainings of these adapters"):
        scored(session, ROWS, adapters="sql")
    learn(session, ROWS, 5, restart=True)
    assert len(scored(session, ROWS, adapters="sql").items) == 5


def test_held_out_rows_that_are_not_known_are_refused(session: Session) -> None:
    with pytest.raises(AdapterError, match=r"no adapter of \w+ was trained in this session"):
        scored(session)
    with pytest.raises(AdapterError, match="it is not known which rows were held out from 'chat'"):
        scored(session, adapters="chat")
    learn(session, ROWS, 5)
    with pytest.raises(ConfigError, match="was trained on 12 rows, and these are 11: its held-out rows are not known"):
        scored(session, ROWS[1:])
    learn(session, ROWS[2:], 5, adapter="chat")
    with pytest.raises(AdapterError, match=r"'(sql|chat)' and other adapters were trained on different rows"):
        scored(session)
    assert len(scored(session, ROWS[2:], adapters="chat").items) == 5


def test_each_adapter_has_held_out_rows_of_its_own(session: Session) -> None:
    session.use(["sql", "chat"])
    learn(session, {"sql": ROWS, "chat": ROWS[3:]}, 0.3, adapter=None)
    assert len(scored(session, ROWS, adapters="sql").items) == 4
    assert len(scored(session, ROWS[3:], adapters="chat").items) == 3
