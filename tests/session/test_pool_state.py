"""What a session tells of a model whose adapters come from a pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbpeft.display.html import to_html
from nbpeft.display.models import model_card, model_text
from nbpeft.errors import UnknownAdapterError
from nbpeft.session import Session
from tests.char_tokenizer import CharTokenizer
from tests.model.pool_support import make_folders, pool_of


def test_adapters_that_wait_in_the_pool_are_counted(session: Session, tmp_path: Path) -> None:
    folders = make_folders(tmp_path)
    pool = pool_of(folders, room=2)
    session.register(pool.model, name="model")
    pool.load("a")
    session.use("b", model="model")
    state = session.state.model("model")
    assert state is not None
    assert {item.name for item in state.adapters} == {"a", "b"} and state.active == ("b",)
    assert state.offloaded_count == len(folders) - 2
    assert "4 more in the pool" in to_html(model_card(state))
    assert "a [LoRA], b* [LoRA] and 4 more in the pool" in model_text(state)
    pool.register("g", folders["a"])
    assert session.state.models[0].offloaded_count == 5
    session.use("c", model="model")
    state = session.state.model("model")
    assert state is not None and state.offloaded_count == 5 and state.active == ("c",)
    pool.close()


def test_a_pool_adapter_can_be_named_where_one_on_the_model_can(session: Session, tmp_path: Path) -> None:
    pool = pool_of(make_folders(tmp_path), room=2)
    session.register(pool.model, name="model")
    made = session.combine({"a": 0.5, "b": -1.0}, name="mix", model="model")
    assert made.adapter.name == "mix" and made.relative_error < 1e-4
    compared = session.compare("ab", adapters=["c"], blend=[{"d": 0.5}], tokenizer=CharTokenizer(), max_new_tokens=2)
    assert [column.title for column in compared.columns] == ["base", "c", "d (0.5)"]
    with pytest.raises(UnknownAdapterError, match="Adapter 'nowhere' not found"):
        session.use("nowhere", model="model")
    pool.close()
