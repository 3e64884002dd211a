"""Which model a command without one means, and that none is taken that was not given."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbpeft.errors import AdapterError, UnknownAdapterError
from nbpeft.model import LoraConfig, get_peft_model
from nbpeft.session import Session
from tests.char_tokenizer import CharTokenizer
from tests.tiny_models import config, llama
from tests.training.support import token_rows

FIELDS = {"r": 2, "target_modules": ["q_proj"]}


@pytest.fixture
def two(session: Session) -> tuple[Any, Any]:
    """Two models with an adapter ``x``; the second one is the current one."""
    return tuple(session.add(llama(), FIELDS, name="x", variable=name).model for name in ("first", "second"))  # type: ignore[return-value]


COMMANDS: dict[str, Callable[[Session, Path], object]] = {
    "merge": lambda session, folder: session.merge(),
    "merge into a folder": lambda session, folder: session.merge(to=folder / "merged"),
    "unmerge": lambda session, folder: session.unmerge(),
    "unload": lambda session, folder: session.unload(),
    "delete": lambda session, folder: session.delete("x"),
    "rename": lambda session, folder: session.rename("x", "y"),
    "combine": lambda session, folder: session.combine({"x": 1.0}, name="y"),
    "swap": lambda session, folder: session.swap(folder / "x"),
    "train": lambda session, folder: session.train(None, token_rows(4), max_steps=1),
    "undo": lambda session, folder: session.undo(),
    "reset": lambda session, folder: session.reset("x"),
    "use": lambda session, folder: session.use("x"),
    "use base": lambda session, folder: session.use("base"),
    "scale": lambda session, folder: session.scale("x", 2.0),
    "freeze": lambda session, folder: session.freeze("x"),
    "freeze off": lambda session, folder: session.freeze("x", off=True),
    "add": lambda session, folder: session.add(None, FIELDS, name="y"),  # type: ignore[arg-type]
    "load": lambda session, folder: session.load(folder / "x", name="y"),
    "save": lambda session, folder: session.save(folder / "again"),
    "copy": lambda session, folder: session.copy("x", "y"),
    "compare": lambda session, folder: session.compare("a", tokenizer=CharTokenizer()),
    "try_combination": lambda session, folder: session.try_combination({"x": 1.0}, "a", tokenizer=CharTokenizer()),
    "inspect": lambda session, folder: session.inspect("x"),
    "memory": lambda session, folder: session.memory(),
    "plan": lambda session, folder: session.plan(),
    "export": lambda session, folder: session.export(str(folder / "train.py"), token_rows(4)),
    "start_run": lambda session, folder: session.start_run(),
    "this": lambda session, folder: session.model(),
}


def state_of(*models: Any) -> list[Any]:
    return [
        (model.manager.names, model.manager.active, model.manager.merged, model.manager.alive, model.manager.revision)
        for model in models
    ]


@pytest.mark.drawn(12)
@pytest.mark.parametrize("what", COMMANDS)
def test_every_command_asks_which_of_several(session: Session, two: tuple[Any, Any], tmp_path: Path, what: str) -> None:
    session.save(tmp_path / "x", adapter="x", model="first")
    before, files = state_of(*two), sorted(tmp_path.rglob("*"))
    command = what.partition(" ")[0]
    words = f"several models carry adapters; {command} needs one of them: model='first' or model='second'"
    with pytest.raises(AdapterError, match=words) as caught:
        COMMANDS[what](session, tmp_path)
    assert caught.value.details["available"] == ("first", "second")
    assert sorted(tmp_path.rglob("*")) == files
    assert state_of(*two) == before and session.state.current == "second"


NAMED: dict[str, Callable[[Session, Path], object]] = {
    "use": lambda session, folder: session.use("y"),
    "scale": lambda session, folder: session.scale("y", 2.0),
    "freeze": lambda session, folder: session.freeze("y"),
    "freeze off": lambda session, folder: session.freeze("y", off=True),
    "save": lambda session, folder: session.save(folder / "y", adapter="y"),
    "delete": lambda session, folder: session.delete(["y"]),
    "rename": lambda session, folder: session.rename("y", "z"),
    "copy": lambda session, folder: session.copy("y", "z"),
    "reset": lambda session, folder: session.reset("y"),
    "merge": lambda session, folder: session.merge("y"),
    "combine": lambda session, folder: session.combine({"x": 1.0, "y": 1.0}, name="z"),
    "convert": lambda session, folder: session.convert("y", 1, name="z"),
    "inspect": lambda session, folder: session.inspect("y"),
    "ship": lambda session, folder: session.ship("y", engine="peft", to=folder / "y"),
    "ask": lambda session, folder: session.ask("a", adapter=["y"], max_new_tokens=1, tokenizer=CharTokenizer()),
    "compare": lambda session, folder: session.compare("a", adapters=["y"], tokenizer=CharTokenizer()),
    "score": lambda session, folder: session.score(
        [{"prompt": "a", "completion": "b"}], adapters=["x+y"], metric="loss", tokenizer=CharTokenizer()
    ),
    "train": lambda session, folder: session.train(None, token_rows(4), adapter="y", max_steps=1, keep=False),
}


@pytest.mark.parametrize("what", NAMED)
def test_the_only_model_with_an_adapter_of_that_name_is_meant(
    session: Session, two: tuple[Any, Any], tmp_path: Path, what: str
) -> None:
    session.copy("x", "y", model="first")
    other = state_of(two[1])
    result = NAMED[what](session, tmp_path)
    assert state_of(two[1]) == other
    assert what in ("train", "score") or "first" in f"{result}{getattr(result, 'model_name', '')}"


def test_a_plus_in_a_name_is_no_sum(session: Session, two: tuple[Any, Any]) -> None:
    session.copy("x", "a+b", model="first")
    rows = [{"prompt": "a", "completion": "b"}]
    result = session.score(rows, adapters="a+b", include_base=False, metric="loss", tokenizer=CharTokenizer())
    assert result.columns == ("a+b",)


def test_adapters_of_several_models_and_of_none(session: Session, two: tuple[Any, Any]) -> None:
    session.copy("x", "mine", model="first")
    session.copy("x", "yours", model="second")
    before = state_of(*two)
    for names in (["mine", "yours"], "x", []):
        with pytest.raises(AdapterError, match="use needs one of them: model='first' or model='second'"):
            session.use(names)
    with pytest.raises(UnknownAdapterError, match=r"the models have: 'x', 'mine', 'yours'\. Did you mean 'yours'"):
        session.use(["mine", "yuors"])
    assert state_of(*two) == before
    session.add(llama(), FIELDS, name="other", variable="third")
    with pytest.raises(AdapterError, match=r"use needs one of them: model='first' or model='second'$"):
        session.use("x")


def test_one_that_is_named_is_the_one(session: Session, two: tuple[Any, Any]) -> None:
    first, second = two
    session.use("base", model="second")
    assert not second.manager.enabled and first.manager.enabled
    session.use("x", model="first")
    assert session.state.current == "first"
    assert session.inspect("x", model=second).model_name == "second"
    assert [model.name for model in session.state.models] == ["first", "second"]


@pytest.mark.parametrize("gone", ["unloaded", "unloaded in Python", "deleted"])
def test_the_only_one_left_is_meant_and_named_but_not_merged_or_unloaded(session: Session, gone: str) -> None:
    left = session.add(llama(), FIELDS, name="x", variable="left").model
    model = session.add(llama(), FIELDS, name="x", variable="model").model
    if gone == "unloaded":
        session.unload(model="model")
    elif gone == "unloaded in Python":
        model.unload()
    del model
    assert session.names == ("left",) and session.state.current is None
    for command in (session.merge, session.unload):
        words = "the model used last is unloaded or gone; say which one is meant: model='left'"
        with pytest.raises(AdapterError, match=words):
            command()
    assert left.manager.merged == () and left.manager.alive
    told = "this is 'left', the only model with adapters: 'model' has none any more"
    assert session.use("base").notes == (told,) and session.use("x").notes == ()
    session.merge()  # said already
    assert session.state.current == "left" and list(left.manager.merged) == ["x"]
    session.unmerge()
    assert not left.manager.merged


def test_adapters_whose_result_is_not_kept_stay_as_long_as_their_model(session: Session) -> None:
    base = llama()
    for number in range(3):
        session.add(base, FIELDS, name=f"a{number}", variable="tiny")
    (model,) = session.state.models
    assert (model.name, [item.name for item in model.adapters]) == ("tiny", ["a0", "a1", "a2"])
    assert session.state.current == "tiny" and session.names == ("tiny",)
    session.use("a1")
    handle = session.model("tiny")
    assert handle is session.model("tiny") and handle.manager.active == ("a1",)
    copied = copy.deepcopy(base)
    assert copied is not handle and session.names == ("tiny",)
    again = get_peft_model(handle.unload(), LoraConfig(target_modules=["q_proj"]))  # the caller's own from now on
    assert not session.names and again.manager.alive
    del again, handle, copied
    session.add(base, FIELDS, name="b", variable="tiny")
    assert session.names == ("tiny",)
    gone = weakref.ref(base)
    del base
    gc.collect()
    assert gone() is None and not session.names


def test_a_model_alone_need_not_be_named(session: Session) -> None:
    model = session.add(llama(), FIELDS, name="x").model
    session.merge()
    assert model.manager.merged == ("x",)
    session.unmerge()
    session.rename("x", "y")
    session.unload()
    again = session.add(llama(), FIELDS, name="x").model
    session.delete("x")
    assert again.manager.names == ()


def test_what_was_adapted_in_python_takes_no_place(session: Session) -> None:
    model = session.add(llama(), FIELDS, name="x", variable="model").model
    other = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    session.adopt({"model": model, "other": other})
    assert session.names == ("model", "other") and session.state.current == "model"
    newer = Session()
    newer.adopt({"model": model, "other": other})
    assert newer.state.current is None
    with pytest.raises(AdapterError, match="use needs one of them: model='model' or model='other'"):
        newer.use("base")
    alone = Session()
    alone.adopt({"other": other})
    assert alone.state.current == "other"


def test_training_names_a_model(session: Session, two: tuple[Any, Any]) -> None:
    session.train(two[0], [{"input_ids": [1, 2, 3]}], max_steps=1)
    assert session.state.current == "first"


class TestAFailure:
    """What fails after the model was touched takes back what it did; the book is as it was."""

    def test_of_adapting(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = session.add(llama(), FIELDS, name="x", variable="model").model
        base = llama()
        before = {name: (id(p), p.requires_grad) for name, p in base.named_parameters()}

        def fail(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("nbpeft.session.commands.adapters.AddResult", fail)
        with pytest.raises(KeyboardInterrupt):
            session.add(base, FIELDS, name="y", variable="model", trainable=False)
        assert {name: (id(p), p.requires_grad) for name, p in base.named_parameters()} == before
        assert session.names == ("model",) and session.model() is kept

    def test_of_loading(self, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        session.save(tmp_path / "x", model=session.add(llama(), FIELDS, name="x", variable="one").model)
        base = llama()
        before = {name: (id(p), p.requires_grad) for name, p in base.named_parameters()}

        def fail(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("nbpeft.session.commands.adapters.LoadResult", fail)
        with pytest.raises(KeyboardInterrupt):
            session.load(tmp_path / "x", model=base)
        assert {name: (id(p), p.requires_grad) for name, p in base.named_parameters()} == before
        gc.collect()  # the first model, which nothing refers to
        assert session.names == ()

    @pytest.mark.parametrize("name", ["a.b", "", "__base__", None])
    def test_of_a_name(self, session: Session, name: Any) -> None:
        base = llama()
        with pytest.raises(AdapterError, match="cannot name an adapter"):
            session.add(base, FIELDS, name=name)
        assert session.names == () and all(parameter.requires_grad for parameter in base.parameters())


def test_a_folder_whose_name_cannot_be_an_adapters(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = session.add(llama(), FIELDS, name="x", variable="model").model
    session.save(tmp_path / "taken", adapter="x")

    def refuse(name: object) -> None:
        if name == "taken":
            raise AdapterError("'taken' cannot name an adapter", name=name)

    monkeypatch.setattr("nbpeft.engine.config.adapter_names.check_name", refuse)
    with pytest.raises(AdapterError, match=r"'taken' cannot name an adapter; give the adapter a name \(name=…\)"):
        session.load(tmp_path / "taken")
    with pytest.raises(AdapterError, match=r"'taken' cannot name an adapter$"):
        session.load(tmp_path / "taken", name="taken")
    assert model.manager.names == ("x",)
    assert session.load(tmp_path / "taken", name="y").adapter.name == "y"


@pytest.mark.parametrize("place", ["x" * 256, "a/" * 2100, "a\0b", "\ud800"])
def test_what_cannot_be_a_path(session: Session, place: str) -> None:
    model = session.add(llama(), FIELDS, name="x").model
    for command in (session.load, session.save, session.swap, lambda path: session.merge(to=path)):
        with pytest.raises(AdapterError, match="is not a path") as caught:
            command(place)
        assert len(str(caught.value)) < 200
    assert torch.is_tensor(next(model.parameters())) and model.manager.merged == ()


def test_a_base_model_whose_handle_nobody_kept_is_still_known_by_itself(tmp_path: Path) -> None:
    session, base = Session(), llama()
    get_peft_model(base, config(), "first")
    session.add(base, {"r": 3}, name="second")
    session.use("first", model=base)
    session.save(tmp_path / "saved", model=base)
    assert {"first", "second"} <= {found.name for found in (tmp_path / "saved").iterdir()}
    reference = weakref.ref(base)
    del base
    gc.collect()
    assert reference() is None
