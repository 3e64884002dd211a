"""A model on the meta device has no values: what needs some says so in one line, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nbpeft
from nbpeft.errors import AdapterError
from nbpeft.session import Session
from tests.char_tokenizer import CharTokenizer
from tests.tiny_models import llama

FIELDS = {"r": 2, "target_modules": ["q_proj"]}
ROWS = [{"prompt": "a", "completion": "b"}] * 4


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def empty(session: Session) -> Any:
    with torch.device("meta"):
        base = llama()
    return session.add(base, FIELDS, name="x", variable="model").model


@pytest.mark.parametrize(
    "act",
    [
        lambda session, model, tokenizer: session.ask("a", model=model, tokenizer=tokenizer),
        lambda session, model, tokenizer: session.compare(["a"], model=model, tokenizer=tokenizer),
        lambda session, model, tokenizer: session.score(ROWS, model=model, tokenizer=tokenizer),
        lambda session, model, tokenizer: session.score(ROWS, metric="loss", model=model, tokenizer=tokenizer),
        lambda session, model, tokenizer: session.train(model, ROWS, tokenizer=tokenizer),
        lambda _, model, tokenizer: nbpeft.train(model, ROWS, tokenizer=tokenizer),
    ],
    ids=["ask", "compare", "score", "loss", "session.train", "train"],
)
def test_values_are_missing(session: Session, empty: Any, act: Callable[[Session, Any, Any], object]) -> None:
    with pytest.raises(
        AdapterError, match=r"^model.embed_tokens has no data \(meta device\): load the model's weights"
    ):
        act(session, empty, CharTokenizer())


def test_a_saved_adapter_is_not_loaded_without_its_values(session: Session, empty: Any, tmp_path: Path) -> None:
    session.save(tmp_path / "y", model=session.add(llama(), FIELDS, name="y", variable="other").model)
    with torch.device("meta"):
        bare = llama()
    for model in (empty, bare):
        with pytest.raises(AdapterError, match="has no data"):
            session.load(tmp_path / "y", model=model)
    assert empty.manager.names == ("x",)


def test_an_adapter_without_values_is_deleted_and_restored(session: Session, empty: Any) -> None:
    session.delete("x", model=empty)
    session.undo(model=empty)
    assert all(parameter.is_meta for parameter in empty.manager.parameters("x"))
