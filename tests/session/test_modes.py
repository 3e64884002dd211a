"""An adapter that is to learn is in training mode, as in PEFT, also on a base that is not: what commands make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.contract.registry import Method, methods
from nbpeft.session import Session
from tests.char_tokenizer import CharTokenizer
from tests.tiny_models import llama, logits, randomize
from tests.training.support import token_rows

FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5}
NOTE = "lora_dropout = 0.5 affects your own calls of the model until model.eval()"


def modes(model: Any) -> list[bool]:
    return [module.training for module in called_modules(model)]


def drops(model: Any) -> bool:
    return not torch.equal(logits(model), logits(model))


@pytest.fixture
def model(session: Session) -> Any:
    result = session.add(llama().eval(), FIELDS, name="sql", variable="model")
    assert result.notes == (NOTE,) and NOTE in str(result)
    randomize(result.model, "sql")
    assert drops(result.model)
    return result.model


def test_questions_and_comparisons_are_answered_without_dropout(session: Session, model: Any) -> None:
    before, settings = modes(model), {"tokenizer": CharTokenizer(), "max_new_tokens": 8}
    asked = [session.ask("Ana", **settings).text for _ in range(2)]
    compared = [session.compare("Ana", max_new_tokens=8).answers for _ in range(2)]
    assert modes(model) == before and True in before and False in before
    model.eval()
    assert {*asked} == {session.ask("Ana", **settings).text}
    assert compared[0] == compared[1] == session.compare("Ana", max_new_tokens=8).answers


def test_after_a_training_an_adapter_is_in_the_mode_of_its_base(session: Session, model: Any) -> None:
    session.train(model, token_rows(4), max_steps=1)
    assert not any(modes(model)) and not drops(model)
    assert not session.add(model, FIELDS, name="sql").notes, "nothing drops any more"
    model.train()
    session.train(model, token_rows(4), max_steps=1)
    assert all(modes(model))


def test_a_training_that_fails_leaves_every_mode(session: Session, model: Any) -> None:
    class Fails(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("no such row")

    before = modes(model)
    with pytest.raises(ValueError, match="no such row"):
        session.train(model, token_rows(4), max_steps=1, callbacks=[Fails()])
    assert modes(model) == before


def test_one_that_is_loaded_to_be_trained_says_so(session: Session, model: Any, tmp_path: Path) -> None:
    session.save(tmp_path / "sql")
    assert NOTE not in session.load(tmp_path / "sql", name="read").notes
    assert not any(modes(model)), "as in PEFT, what is loaded is evaluated"
    assert NOTE in session.load(tmp_path / "sql", name="more", trainable=True).notes
    assert session.add(model, {**FIELDS, "lora_dropout": 0.0}, name="plain").notes == ()
    assert not session.add(llama().train(), FIELDS, variable="other").notes, "all of it trains"


@pytest.mark.drawn(20)
@pytest.mark.parametrize("method", [method for method in methods() if method.sample_configs])
def test_a_method_that_draws_in_training_says_so(session: Session, method: Method) -> None:
    """What is random in training and is no dropout is declared by the method; of all others outputs stay."""
    if method.transforms_calls or method.shares.companion is not None or method.kinds.only:
        return
    fields = dict(next(iter(method.sample_configs.values())))
    fields["target_modules"] = ["q_proj", "down_proj"]
    fields |= {"feedforward_modules": []} if method.peft_type == "IA3" else {}
    result = session.add(llama().eval(), method.config_class(**fields), variable="model")
    randomize(result.model, "default")
    notes = [note for note in result.notes if "randomness of" in note]
    assert bool(notes) is method.draws_in_training is drops(result.model)


def test_what_is_put_back_is_in_the_mode_it_was_in(session: Session, model: Any) -> None:
    before = modes(model)
    session.delete("sql")
    session.undo()
    assert modes(model) == before
    model.eval()
    session.reset("sql")
    assert not any(modes(model))
    session.add(model, {**FIELDS, "r": 2}, name="sql")
    assert any(modes(model))
    session.undo()
    assert not any(modes(model))
