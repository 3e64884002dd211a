"""A training is asked for once: its arguments are handed on as one value, and its rows are opened in one place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from nbpeft.errors import ConfigError, TrainingError
from nbpeft.session import Session
from nbpeft.training import export_script
from nbpeft.training.data import open_data, prepare_data
from nbpeft.training.loop.train import train
from nbpeft.training.request import TrainRequest
from tests.char_tokenizer import CharTokenizer
from tests.training.support import token_rows, trainable


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is opened from here on, in order."""
    calls: list[Any] = []

    def counted(data: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(data)
        return open_data(data, *arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("nbpeft.") and vars(module).get("open_data") is open_data:
            monkeypatch.setattr(module, "open_data", counted)
    return calls


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    paths = [tmp_path / "learn.jsonl", tmp_path / "measure.jsonl"]
    for path in paths:
        path.write_text("\n".join(json.dumps({"text": f"abc {number}"}) for number in range(3)))
    return str(paths[0]), str(paths[1])


def test_a_training_opens_its_rows_once(opened: list[Any], files: tuple[str, str]) -> None:
    train(trainable(), *files, tokenizer=CharTokenizer(), max_steps=1, sample="a")
    assert opened == [*files]


def test_a_training_of_a_session_opens_its_rows_once(opened: list[Any], files: tuple[str, str]) -> None:
    Session().train(trainable(), *files, tokenizer=CharTokenizer(), max_steps=1, sample="a", keep=False)
    assert opened == [*files]


def test_an_exported_training_opens_its_rows_once(opened: list[Any], files: tuple[str, str], tmp_path: Path) -> None:
    export_script(trainable(), tmp_path / "t.py", *files, tokenizer=CharTokenizer(), base=str(tmp_path))
    assert opened == [*files]


def test_a_request_sorts_keywords_and_takes_no_internal_ones() -> None:
    model = trainable()
    request = TrainRequest.of(model, [], 0.5, tokenizer="t", seed=7, is_open=True, learning_rate=1.0, patience=None)
    assert (request.tokenizer, request.seed, request.eval_data, request.is_open) == ("t", 7, 0.5, False)
    assert request.arguments == {"seed": 7, "is_open": True, "learning_rate": 1.0}
    assert request.given == {"tokenizer": "t"} | request.arguments


@pytest.mark.parametrize("seed", [None, "7"])
def test_the_seed_is_the_trainers_where_none_is_given(seed: Any) -> None:
    assert TrainRequest.of(trainable(), [], seed=seed).seed == TrainingArguments(output_dir="x").seed == 42


def test_rows_are_refused_where_they_cannot_be_opened() -> None:
    with pytest.raises(TrainingError, match="has no rows"):
        TrainRequest(trainable(), []).opened()
    request = TrainRequest(trainable(), token_rows(), 0.5).opened()
    assert request.opened() is request and request.eval_data == 0.5


@pytest.mark.parametrize("name", ["skip_bad", "packing", "stop_on_divergence", "replace"])
def test_an_option_is_true_or_false_and_no_text(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be True or False, not 'yes'"):
        TrainRequest.of(trainable(), [], **{name: "yes"})


def test_no_reader_of_rows_takes_a_text_as_true() -> None:
    for read in (prepare_data, Session().data):
        with pytest.raises(ConfigError, match="skip_bad must be True or False, not 'yes'"):
            read([{"text": "a"}], skip_bad="yes")
