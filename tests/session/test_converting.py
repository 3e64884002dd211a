"""``session.convert``: a LoRA beside the adapter, which says what it keeps."""

from __future__ import annotations

from typing import Any

import pytest

from nbpeft.errors import AdapterExistsError, ConfigError, UnknownAdapterError
from nbpeft.session import Session
from tests.closeness import assert_close
from tests.session.support import everything
from tests.tiny_models import classifier, llama, logits, randomize, same_state


@pytest.fixture
def rotated(session: Session) -> Any:
    """An OFT adapter ``a``, active."""
    fields = {"peft_type": "oft", "oft_block_size": 4, "target_modules": ["q_proj", "v_proj"]}
    handle = session.add(llama(), fields, name="a", variable="model").model
    randomize(handle, "a")
    return handle.eval()


def test_a_lora_is_made_beside_it_and_says_what_it_keeps(session: Session, rotated: Any) -> None:
    expected = logits(rotated)
    result = session.convert("a", 8)
    assert rotated.manager.names == ("a", "a_lora") and rotated.active_adapters == ["a"]
    assert "a_lora" in rotated.manager.frozen and result.adapter.summary == {"r": "8", "α": "8"}
    assert str(result).startswith("converted 'a' (OFT) to 'a_lora' on model: LoRA, rank 8, 4 layers, keeps ")
    assert result.worst.path in str(result) and result.worst.energy_kept <= result.median < 1
    assert "closest to a" in result._repr_html_() and result.worst.path in result._repr_html_()
    whole = session.convert("a", 1.0, name="b")
    assert str(whole).endswith("nothing of the change lost") and whole.adapter.summary["r"].endswith("*")
    session.use("b")
    assert_close(logits(rotated), expected)


def test_doing_it_again_takes_a_word_and_can_be_undone(session: Session, rotated: Any) -> None:
    session.convert("a", 8)
    before = everything(rotated)
    with pytest.raises(AdapterExistsError, match=r"model has an adapter 'a_lora' already; .*replace"):
        session.convert("a", 4)
    assert session.convert("a", 4, replace=True).adapter.summary["r"] == "4"
    session.undo()
    assert same_state(everything(rotated), before)


def test_what_fails_leaves_everything_as_it_was(session: Session, rotated: Any) -> None:
    before = everything(rotated)
    for name, rank, error in (("a", 99, ConfigError), ("a", 0.0, ConfigError), ("b", 4, UnknownAdapterError)):
        with pytest.raises(error):
            session.convert(name, rank)
    with pytest.raises(AdapterExistsError):
        session.convert("a", 4, name="a", replace=True)
    assert same_state(everything(rotated), before)


def test_a_trained_head_is_copied(session: Session) -> None:
    fields = {"peft_type": "hra", "r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    handle = session.add(classifier(), fields, name="a", variable="model").model.eval()
    randomize(handle, "a")
    expected = logits(handle)
    session.convert("a", 2)
    session.use("a_lora")
    assert_close(logits(handle), expected)
    head = handle.manager.copies["score"].modules_to_save
    assert head["a"].weight.data_ptr() != head["a_lora"].weight.data_ptr()
