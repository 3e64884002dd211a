"""A folder that holds another adapter is not written over unasked, and marks say which adapters have no copy."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nbpeft
from nbpeft.engine.contract.trained import mark_unsaved
from nbpeft.errors import AdapterExistsError, CheckpointError
from nbpeft.model.saving import saved_places
from nbpeft.model.saving.saved_places import owner_of
from nbpeft.session import Session
from tests.tiny_models import classifier, gpt2, llama, randomize
from tests.training.support import token_rows
from tests.waiting import PATIENCE

FIELDS = {"r": 2, "target_modules": ["q_proj"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def learn(session: Session, name: str, seed: int = 0, model: str = "model") -> None:
    randomize(session.model(model), name, seed)
    mark_unsaved(session.model(model).manager, name)


@pytest.fixture
def two(session: Session, tmp_path: Path) -> Any:
    """``c`` and ``d`` of one config, trained; ``c`` is saved in ``one``."""
    model = session.add(llama(), FIELDS, name="c", variable="model").model
    session.add(model, FIELDS, name="d")
    learn(session, "c", 1)
    learn(session, "d", 2)
    session.save(tmp_path / "one", adapter="c")
    assert session.unsaved(model) == ("d",)
    return model


def test_a_new_head_that_is_not_in_the_folder_is_named(session: Session, tmp_path: Path) -> None:
    base = classifier()
    base.config.architectures = ["LlamaForCausalLM"]
    model = session.add(base, FIELDS, name="team", variable="clf").model
    assert session.save(tmp_path / "new", adapter="team").notes == ()
    rows = [{"input_ids": [1, 2, 3], "labels": label} for label in (0, 1)]
    with pytest.warns(UserWarning, match="The head 'score'"):
        session.train(model, rows, max_steps=1, keep=False)
    (note,) = session.save(tmp_path / "trained", adapter="team").notes
    assert "The head 'score' is newly initialized" in note and "is not saved with the adapter" in note
    session.add(model, FIELDS | {"modules_to_save": ["score"]}, name="whole")
    session.train(model, rows, adapter="whole", max_steps=1, keep=False)
    for active in ("whole", "team"):
        session.use(active)
        assert session.save(tmp_path / "whole", adapter="whole").notes == ()
        assert len(session.save(tmp_path / "trained", adapter="team").notes) == 1


def refused(session: Session, folder: Path, told: str, **options: Any) -> None:
    before = contents(folder)
    with pytest.raises(AdapterExistsError, match=told) as caught:
        session.save(folder, **options)
    assert "replace it (replace=…)" in str(caught.value) and contents(folder) == before


def test_the_only_copy_of_another_adapter_is_not_replaced_unasked(session: Session, two: Any, tmp_path: Path) -> None:
    refused(session, tmp_path / "one", "one holds another adapter, 'c': choose another folder for 'd'", adapter="d")
    assert session.unsaved(two) == ("d",)
    session.save(tmp_path / "one", adapter="d", replace=True)
    assert session.unsaved(two) == ("c",), "its only copy was replaced"
    session.save(tmp_path / "two", adapter="c")
    session.save(tmp_path / "one", adapter="d")
    assert session.unsaved(two) == ()


def test_one_that_has_another_copy_stays_saved(session: Session, two: Any, tmp_path: Path) -> None:
    session.save(tmp_path / "two", adapter="c")
    session.save(tmp_path / "one", adapter="d", replace=True)
    assert session.unsaved(two) == ()
    session.save(tmp_path / "two", adapter="d", replace=True)
    assert session.unsaved(two) == ("c",)


def test_a_copy_from_before_a_training_is_none(session: Session, two: Any, tmp_path: Path) -> None:
    learn(session, "c", 3)
    session.save(tmp_path / "two", adapter="c")
    session.save(tmp_path / "two", adapter="d", replace=True)
    assert session.unsaved(two) == ("c",), "what one has is older"


def test_a_copy_that_was_removed_is_none(session: Session, two: Any, tmp_path: Path) -> None:
    session.save(tmp_path / "two", adapter="c")
    shutil.rmtree(tmp_path / "two")
    session.save(tmp_path / "one", adapter="d", replace=True)
    assert session.unsaved(two) == ("c",)


@pytest.mark.parametrize("how", ["again", "trained further", "renamed", "reconfigured", "loaded", "a new kernel"])
def test_the_same_adapter_is_saved_to_its_folder_again(
    session: Session, two: Any, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "c"
    if how == "trained further":
        learn(session, "c", 5)
    elif how == "renamed":
        session.rename("c", "e")
        name = "e"
    elif how == "reconfigured":
        session.add("model", {**FIELDS, "lora_alpha": 32}, name="c")
    elif how == "loaded":
        name = session.load(tmp_path / "one", name="again").adapter.name
    elif how == "a new kernel":
        forget(monkeypatch)
    session.save(tmp_path / "one", adapter=name)
    assert torch.equal(*(load_file(tmp_path / "one" / "adapter_model.safetensors")[key] for key in (KEY, KEY)))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that knows nothing of what was saved."""
    monkeypatch.setattr("nbpeft.model.saving.saved_places._owners", {})


@pytest.mark.parametrize(
    ("base", "fields", "name", "told"),
    [
        (llama, FIELDS, "d", "holds another adapter, 'c'"),
        (lambda: llama(seed=1), FIELDS, "c", r"of another base model \(other weights of the same shapes\)"),
        (gpt2, {"r": 2, "target_modules": ["c_attn"]}, "c", r"of another base model \(LlamaForCausalLM with"),
        (llama, {**FIELDS, "r": 4}, "c", r"holds an adapter with other tensors \(LORA, r=2\)"),
        (llama, {**FIELDS, "target_modules": ["q_proj", "v_proj"]}, "c", "an adapter with other tensors"),
        (llama, {"peft_type": "ia3", "target_modules": ["q_proj"], "feedforward_modules": []}, "c", "other tensors"),
    ],
    ids=["name", "weights", "architecture", "rank", "targets", "method"],
)
def test_what_another_kernel_saved_is_known_by_its_files(
    two: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: Callable[[], Any],
    fields: dict[str, Any],
    name: str,
    told: str,
) -> None:
    forget(monkeypatch)
    other = Session()
    held = other.add(base(), fields, name=name, variable="other").model
    assert held.manager.names == (name,)
    refused(other, tmp_path / "one", told)
    other.save(tmp_path / "one", replace=True)
    assert other.load(tmp_path / "one", name="back").adapter.parameter_count > 0


def test_a_file_that_was_replaced_by_others_is_looked_at(session: Session, two: Any, tmp_path: Path) -> None:
    weights = tmp_path / "one" / "adapter_model.safetensors"
    tensors = {key: tensor.repeat(2, 1) for key, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    refused(session, tmp_path / "one", "an adapter with other tensors", adapter="c")


@pytest.mark.parametrize("broken", ["weights", "config alone", "pickled"])
def test_what_cannot_be_read_is_another_adapter(session: Session, two: Any, tmp_path: Path, broken: str) -> None:
    weights = tmp_path / "one" / "adapter_model.safetensors"
    if broken == "weights":
        weights.write_bytes(b"no tensors")
    else:
        weights.unlink()
    if broken == "pickled":
        (tmp_path / "one" / "adapter_model.bin").write_bytes(b"x")
    refused(session, tmp_path / "one", "one holds (an|the config of an) adapter", adapter="d")


def test_several_are_saved_together_or_not_at_all(session: Session, two: Any, tmp_path: Path) -> None:
    session.save(tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["README.md", "c", "d"]
    session.rename("c", "e")
    session.copy("d", "c")
    refused(session, tmp_path / "all", "all/c holds another adapter, 'e'")
    assert not (tmp_path / "all" / "e").exists()


def test_an_older_file_says_no_name(
    session: Session, two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)
    weights = tmp_path / "one" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    session.save(tmp_path / "one", adapter="d")
    assert session.unsaved(two) == ()


def test_save_pretrained_replaces_as_in_peft_and_marks_are_right(session: Session, two: Any, tmp_path: Path) -> None:
    two.save_pretrained(str(tmp_path / "all"))
    assert session.unsaved(two) == ()
    second = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="c")
    second.save_pretrained(str(tmp_path / "all"))
    assert session.unsaved(two) == (), "c is in one as well"
    second.save_pretrained(str(tmp_path / "third"))
    session.save(tmp_path / "third" / "c", adapter="c", replace=True)
    assert second.manager.unsaved == set(), "it is in all as well"
    session.save(tmp_path / "all" / "c", adapter="c", replace=True)
    assert second.manager.unsaved == {"c"}


def test_a_loaded_adapter_whose_file_is_replaced_is_not_saved(session: Session, two: Any, tmp_path: Path) -> None:
    reader = Session()
    loaded = reader.load(tmp_path / "one", name="l", model=llama(), variable="reader")
    assert reader.unsaved(loaded.model) == ()
    session.save(tmp_path / "two", adapter="c")
    session.save(tmp_path / "one", adapter="d", replace=True)
    assert reader.unsaved(loaded.model) == ("l",) and session.unsaved(two) == (), "c is in two as well"
    again = reader.load(tmp_path / "one", name="m", model=loaded.model)
    session.save(tmp_path / "one", adapter="c", replace=True)
    assert reader.unsaved(again.model) == ("l", "m") and session.unsaved(two) == ("d",)


def test_a_failed_write_changes_no_mark(
    session: Session, two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tmp_path / "one")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nbpeft.checkpoint.folder.write_tensors", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        session.save(tmp_path / "one", adapter="d", replace=True)
    assert session.unsaved(two) == ("d",) and contents(tmp_path / "one") == before


def test_nothing_keeps_a_model_that_was_saved(tmp_path: Path) -> None:
    import gc
    import weakref

    session = Session()
    session.save(tmp_path / "x", model=session.add(llama(), FIELDS, name="x", variable="gone").model)
    manager = weakref.ref(session.model("gone").manager) if "gone" in session.names else lambda: None
    gc.collect()
    assert manager() is None
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["r"] == 2


def test_what_is_written_over_a_copy_otherwise_corrects_the_mark(session: Session, two: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        nbpeft.save_as_lora(tmp_path / "one", two, rank=2, adapter_name="c")
    assert session.unsaved(two) == ("c", "d")
    session.save(tmp_path / "two", adapter="c")
    with pytest.raises(CheckpointError, match="already exists"):
        session.ship("c", engine="peft", to=tmp_path / "two")
    assert session.unsaved(two) == ("d",)
    session.ship("d", engine="peft", to=tmp_path / "two", replace=True)
    assert session.unsaved(two) == ("c", "d")


def test_followers_are_told_when_other_threads_can_save(session: Session, two: Any, tmp_path: Path) -> None:
    """What follows a manager may wait for a thread that is about to save; the marks are set before it hears of them."""
    manager, seen = two.manager, list[tuple[bool, set[str]]]()

    class Follower:
        def changed(self) -> None:
            other = threading.Thread(target=lambda: owner_of(manager, "d", tmp_path / "one"), daemon=True)
            other.start()
            other.join(PATIENCE)
            seen.append((other.is_alive(), set(manager.unsaved)))

    follower = Follower()
    manager.subscribe(follower.changed)
    session.save(tmp_path / "one", adapter="d", replace=True)
    assert seen and not any(waits for waits, _ in seen)
    assert all(unsaved == {"c"} for _, unsaved in seen), "d is saved, and c has no copy any more"


def test_marks_and_places_are_read_together(session: Session, two: Any, tmp_path: Path) -> None:
    other = threading.Thread(target=lambda: saved_places.note_written_over([tmp_path / "one"]), daemon=True)
    with saved_places._lock:
        other.start()
        assert owner_of(two.manager, "c", tmp_path / "one") == ""
    other.join(PATIENCE)
    assert owner_of(two.manager, "c", tmp_path / "one") is None and two.manager.unsaved == {"c", "d"}


def test_its_readme_says_what_it_was_trained_on(session: Session, tmp_path: Path) -> None:
    model = session.add(llama(), FIELDS, name="c", variable="model").model
    session.train(model, token_rows(4), max_steps=2, per_device_train_batch_size=2, eval_data=token_rows(2))
    session.save(tmp_path / "one", adapter="c")
    text = (tmp_path / "one" / "README.md").read_text()
    assert "A LoRA adapter for a LlamaForCausalLM with" in text and "# c" in text
    assert "| data | 4 rows" in text and "evaluation loss" in text and "| `max_steps` | `2` |" in text
    assert "data_hint" not in text and not (tmp_path / "one" / "loss_curve.svg").exists()
