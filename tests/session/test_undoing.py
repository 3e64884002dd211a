"""What was deleted or replaced comes back, an adapter starts anew, and training that is not saved is not given up."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbpeft.errors import AdapterError, AdapterExistsError, BusyError, MergeError, UnknownAdapterError
from nbpeft.model import LoraConfig, get_peft_model
from nbpeft.session import Session, history
from tests.session.support import everything
from tests.state_machine_model import live_tensors
from tests.tiny_models import llama, logits, randomize, same_state
from tests.training.support import token_rows, weights

FIELDS = {"r": 2, "target_modules": ["q_proj"]}
OTHER = {"r": 4, "target_modules": ["q_proj"]}


@pytest.fixture
def model(session: Session) -> Any:
    """Adapters ``chat`` and ``sql``, which is active, was trained and is not saved."""
    made = session.add(llama(), FIELDS, name="chat", variable="model").model
    session.add(made, {**FIELDS, "lora_alpha": 5}, name="sql")
    randomize(made, "chat", 1)
    session.train(made, token_rows(4), max_steps=2, learning_rate=0.1)
    return made.eval()


@pytest.fixture
def saved(session: Session, model: Any, tmp_path: Path) -> Path:
    """A folder with an adapter like ``chat``."""
    session.save(tmp_path / "chat", adapter="chat")
    return tmp_path / "chat"


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    weights, others = found.pop("weights"), wanted.pop("weights")
    equal = weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in others)
    return equal and found == wanted


def state_of(session: Session, name: str) -> Any:
    return next(item for item in session.state.models[0].adapters if item.name == name)


TAKING: dict[str, tuple[str, Callable[[Session, Path], object]]] = {
    "delete": ("deleted", lambda session, folder: session.delete("sql")),
    "reset": ("reset", lambda session, folder: session.reset("sql")),
    "reconfigure": ("reconfigured", lambda session, folder: session.add("model", OTHER, name="sql")),
    "reconfigure and keep": (
        "reconfigured",
        lambda session, folder: session.add("model", {**FIELDS, "lora_alpha": 64}, name="sql"),
    ),
    "load": ("replaced", lambda session, folder: session.load(folder, name="sql", replace=True)),
    "swap": ("swapped", lambda session, folder: session.swap(folder, into="sql", replace=True)),
    "combine": (
        "combined again",
        lambda session, folder: session.combine({"chat": 0.5}, name="sql", replace=True),
    ),
}


@pytest.mark.drawn(4)
@pytest.mark.parametrize("what", TAKING)
def test_undo_brings_everything_back(session: Session, model: Any, saved: Path, what: str) -> None:
    session.scale("sql", 0.5)
    before, shown = everything(model), session.state.models[0]
    did, take = TAKING[what]
    take(session, saved)
    assert session.state.models[0] != shown
    result = session.undo()
    assert result.line == f"'sql' is back, as it was before it was {did}; its training is not saved"
    assert same(everything(model), before)
    assert session.state.models[0] == shown and state_of(session, "sql").unsaved
    again = session.add(model, {**FIELDS, "lora_alpha": 5}, name="sql")
    assert again.unchanged, "what it was made with is known again"
    with pytest.raises(AdapterError, match="nothing to undo on model"):
        session.undo()


def test_several_are_deleted_and_come_back_one_by_one(session: Session, model: Any) -> None:
    before = everything(model)
    with pytest.raises(UnknownAdapterError, match="nope"):
        session.delete(["sql", "nope"])
    assert same(everything(model), dict(before)), "all or none"
    result = session.delete(["sql", "chat"])
    assert result.line == "deleted 'sql', 'chat'"
    assert result.notes == ("not saved after training: 'sql'; each session.undo() restores one, the last first",)
    assert not model.manager.names
    session.undo()
    assert model.manager.names == ("chat",)
    session.undo()
    assert same(everything(model), before)


def test_undoing_draws_no_random_numbers(session: Session, model: Any) -> None:
    session.delete("sql")
    before = torch.get_rng_state()
    session.undo()
    assert torch.equal(torch.get_rng_state(), before)


def test_undo_brings_back_what_acted_whatever_was_written_into_the_config(session: Session) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(llama(), config).eval()
    session.register(adapted, name="edited")
    wanted = logits(adapted)
    config.lora_alpha = 64
    assert torch.equal(logits(adapted), wanted)
    session.delete("default", model="edited")
    session.undo(model="edited")
    assert torch.equal(logits(adapted.eval()), wanted)


def test_undo_goes_further_back_each_time(session: Session, model: Any) -> None:
    states = []
    for fields in ({"lora_alpha": 9}, {"r": 3}, {"r": 3, "lora_alpha": 1}, {"target_modules": ["v_proj"]}):
        states.append(everything(model))
        session.add(model, {**FIELDS, **fields}, name="sql")
    states.append(everything(model))
    session.delete("sql")
    for before in reversed(states):
        session.undo()
        assert same(everything(model), before)


def test_a_combination_is_one_again(session: Session, model: Any) -> None:
    session.combine({"chat": 0.5}, name="half")
    session.delete("half")
    session.undo()
    assert session.combine({"chat": 0.7}, name="half").remade, "it need not be told to replace it"
    session.undo()
    assert session.combine({"chat": 0.7}, name="half").remade


class TestWhatIsNotGivenUp:
    def test_a_successor_that_was_trained(self, session: Session, model: Any) -> None:
        session.add(model, OTHER, name="sql")
        session.train(model, token_rows(4), max_steps=1)
        before = everything(model)
        with pytest.raises(AdapterError, match="'sql' was trained since it was reconfigured and is not saved: save or"):
            session.undo()
        assert same(everything(model), before)
        session.rename("sql", "wide")
        session.undo()
        assert model.manager.names == ("chat", "sql", "wide") and model.manager.configs["wide"].r == 4

    def test_an_adapter_that_has_the_name_now(self, session: Session, model: Any) -> None:
        session.delete("sql")
        session.add(model, OTHER, name="sql")
        with pytest.raises(AdapterExistsError, match="'sql' was deleted, and another adapter has the name now: rename"):
            session.undo()
        assert model.manager.configs["sql"].r == 4

    def test_by_a_swap(self, session: Session, model: Any, saved: Path) -> None:
        before = everything(model)
        words = r"'sql' was trained and is not saved: save it first, or replace it \(replace=…\)"
        with pytest.raises(AdapterError, match=words):
            session.swap(saved, into="sql")
        assert same(everything(model), before)
        session.save(saved.parent / "sql", adapter="sql")
        session.swap(saved, into="sql")

    def test_by_loading(self, session: Session, model: Any, saved: Path) -> None:
        words = r"model has an adapter 'sql' already, which was trained and is not saved; give .* \(replace=…\)"
        with pytest.raises(AdapterExistsError, match=words):
            session.load(saved, name="sql")
        assert session.load(saved, name="sql", replace=True).adapter.unsaved is False
        with pytest.raises(AdapterExistsError, match="has an adapter 'sql' already; give the loaded one"):
            session.load(saved, name="sql")

    def test_by_combining(self, session: Session, model: Any) -> None:
        words = r"model has an adapter 'sql' already, which was trained and is not saved; choose another name"
        with pytest.raises(AdapterExistsError, match=words):
            session.combine({"chat": 1.0}, name="sql")
        session.combine({"chat": 1.0}, name="half")
        assert session.combine({"chat": 0.5}, name="half").notes == (
            "it replaces the previous combination; session.undo() restores that",
        )
        session.freeze("half", off=True)
        session.train(model, token_rows(4), adapter="half", max_steps=1)
        session.freeze("half")
        with pytest.raises(AdapterExistsError, match="which was trained and is not saved"):
            session.combine({"chat": 1.0}, name="half")


class TestUnsavedTraining:
    def test_is_marked_until_it_is_saved(self, session: Session, model: Any, tmp_path: Path) -> None:
        assert [item.unsaved for item in session.state.models[0].adapters] == [False, True]
        session.save(tmp_path / "sql", adapter="sql")
        assert not state_of(session, "sql").unsaved
        session.train(model, token_rows(4), max_steps=1)
        assert state_of(session, "sql").unsaved
        session.train(model, token_rows(4), max_steps=1, output_dir=str(tmp_path / "run"))
        assert not state_of(session, "sql").unsaved, "it was saved at the end of the training"

    def test_is_not_saved_by_checkpoints_that_go(self, session: Session, model: Any, tmp_path: Path) -> None:
        session.save(tmp_path / "sql", adapter="sql")
        session.train(model, token_rows(4), token_rows(4), max_steps=1, eval_steps=1, load_best_model_at_end=True)
        assert state_of(session, "sql").unsaved

    def test_is_seen_in_a_loop_of_ones_own(self, session: Session, model: Any, tmp_path: Path) -> None:
        session.save(tmp_path / "sql", adapter="sql")
        states: list[bool] = []
        session.subscribe(lambda state: states.append(state.models[0].adapters[1].unsaved))
        optimizer = torch.optim.SGD(model.manager.parameters("sql"), lr=0.1)
        ids = torch.arange(8)[None]
        with session.start_run(model, total_steps=2) as run:
            for _ in range(2):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                run.step(loss)
        assert states[-1] and state_of(session, "sql").unsaved

    def test_is_named_when_it_is_deleted(self, session: Session, model: Any) -> None:
        assert session.delete("sql").notes == (
            "it was trained and not saved; session.undo() restores it",
            "'chat' is active now",
        )
        assert session.delete("chat").notes == ()

    def test_stays_or_is_named_when_it_is_reconfigured(self, session: Session, model: Any) -> None:
        alpha = {**FIELDS, "lora_alpha": 64}
        assert session.preview(model, alpha, name="sql").notes == ("its trained weights would stay as they are",)
        before = [one.detach().clone() for one in model.manager.parameters("sql")]
        assert session.add(model, alpha, name="sql").notes == ("its trained weights stay as they are",)
        assert all(map(torch.equal, before, model.manager.parameters("sql"))) and state_of(session, "sql").unsaved
        assert model.manager.layers["model.layers.0.self_attn.q_proj"].adapter("sql").scaling == 32.0
        assert session.preview(model, OTHER, name="sql").notes == ("its weights would be initialized again",)
        note = "its weights are initialized again; session.undo() restores the trained ones"
        assert session.add(model, OTHER, name="sql").notes == (note,)
        assert not state_of(session, "sql").unsaved
        assert session.add(model, FIELDS, name="sql").notes == (note.replace("trained", "old"),)


class TestReset:
    def test_draws_new_weights_and_keeps_the_rest(self, session: Session, model: Any) -> None:
        session.scale("chat", 0.5)
        session.freeze("chat")
        config = model.manager.configs["chat"].to_dict()
        result = session.reset("chat")
        assert result.line == "reset 'chat': its weights are initialized again"
        assert result.notes == ("session.undo() restores the old ones",)
        first, second = model.manager.parameters("chat")[:2]
        assert first.any() and not second.any(), "as a new LoRA adapter: A drawn, B zero"
        assert model.manager.names == ("chat", "sql") and model.manager.active == ("sql",)
        assert model.manager.scale("chat") == 0.5 and model.manager.frozen == {"chat"}
        assert model.manager.configs["chat"].to_dict() == config
        assert session.add(model, FIELDS, name="chat").unchanged

    def test_knows_the_first_weights_under_another_name(self, session: Session) -> None:
        model = session.add(llama(), FIELDS, name="sql", variable="model").model
        first = [one.detach().clone() for one in model.manager.parameters("sql")]
        randomize(model, "sql", 1)
        session.rename("sql", "orders")
        session.reset("orders")
        assert all(map(torch.equal, first, model.manager.parameters("orders")))

    def test_can_train_then(self, session: Session, model: Any) -> None:
        session.reset("sql")
        assert not state_of(session, "sql").unsaved and state_of(session, "sql").trainable
        session.train(model, token_rows(4), max_steps=1)
        assert state_of(session, "sql").unsaved

    @pytest.mark.filterwarnings("ignore:Of adapter")
    def test_not_while_it_is_merged_or_trains(self, session: Session, model: Any) -> None:
        session.merge("sql")
        with pytest.raises(MergeError, match="'sql' merged: unmerge before 'sql' is replaced"):
            session.reset("sql")
        session.unmerge()
        with session.start_run(model, total_steps=2) as run:
            for command in (session.undo, lambda: session.reset("chat")):
                with pytest.raises(BusyError, match="while model is training sql; stop it first"):
                    command()
            run.step(1.0)
        session.reset("sql")

    def test_of_one_that_is_not_there(self, session: Session, model: Any) -> None:
        with pytest.raises(UnknownAdapterError, match="Did you mean 'sql'"):
            session.reset("sq")


class TestWhatIsKept:
    def test_is_bounded(self, session: Session, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(history.MOST_KEPT + 3):
            session.add(model, {**FIELDS, "lora_alpha": 10 + number}, name="sql")
        kept = session.context.history.of(model.manager)
        assert len(kept) == history.MOST_KEPT and kept[-1].kept.config.lora_alpha == 10 + history.MOST_KEPT + 1
        monkeypatch.setattr(history, "MOST_BYTES", 2 * kept[-1].kept.byte_count)
        session.delete("chat")
        assert len(session.context.history.of(model.manager)) == 2
        monkeypatch.setattr(history, "MOST_BYTES", 0)
        session.delete("sql")
        assert len(session.context.history.of(model.manager)) == 1, "the last one always"
        session.undo()

    def test_is_on_the_host_and_released_with_the_adapters(self, session: Session) -> None:
        base = llama()
        before = live_tensors()
        model = session.add(base, FIELDS, name="sql").model
        session.reset("sql")
        session.delete("sql")
        groups = [past.kept.weights.adapters.values() for past in session.context.history.of(model.manager)]
        assert {one.device.type for group in groups for named in group for one in named.values()} == {"cpu"}
        session.unload()
        assert not list(session.context.history._past)
        del groups
        gc.collect()
        assert live_tensors() == before, "although a dead handle is still held"
        assert not model.manager.alive

    def test_goes_with_the_model(self, session: Session) -> None:
        model = session.add(llama(), FIELDS, name="sql").model
        session.delete("sql")
        assert len(session.context.history._past) == 1
        del model
        gc.collect()
        assert len(session.context.history._past) == 0

    def test_is_not_what_failed(self, session: Session, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        before = everything(model)

        def fail(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(history.History, "add", fail)
        for command in (lambda: session.delete("sql"), lambda: session.reset("sql")):
            with pytest.raises(KeyboardInterrupt):
                command()
        assert same(everything(model), before) and not session.context.history.of(model.manager)
        assert session.add(model, {**FIELDS, "lora_alpha": 5}, name="sql").unchanged


@pytest.mark.parametrize("how", ["add", "load", "rename", "copy", "combine"])
def test_no_adapter_is_called_base(session: Session, model: Any, saved: Path, how: str) -> None:
    commands: dict[str, Callable[[], object]] = {
        "add": lambda: session.add(model, FIELDS, name="base"),
        "load": lambda: session.load(saved, name="base"),
        "rename": lambda: session.rename("chat", "base"),
        "copy": lambda: session.copy("chat", "base"),
        "combine": lambda: session.combine({"chat": 1.0}, name="base"),
    }
    with pytest.raises(AdapterError, match="'base' cannot name an adapter: it means the base model in panels"):
        commands[how]()
    assert model.manager.names == ("chat", "sql")


def test_a_folder_called_base_needs_another_name(session: Session, model: Any, tmp_path: Path) -> None:
    session.save(tmp_path / "base", adapter="chat")
    with pytest.raises(AdapterError, match=r"take another name; give the adapter a name \(name=…\)"):
        session.load(tmp_path / "base")
    assert session.load(tmp_path / "base", name="loaded").adapter.name == "loaded"


def test_configs_of_peft_are_the_same_object_again(session: Session, model: Any) -> None:
    config = model.peft_config["sql"]
    assert isinstance(config, LoraConfig)
    session.delete("sql")
    session.undo()
    assert model.peft_config["sql"] is config


def test_undo_says_how_a_training_is_undone(session: Session, tmp_path: Path) -> None:
    session.context.chosen_runs_folder = str(tmp_path)
    model = session.add(llama(), FIELDS, name="chat", variable="model").model
    steps: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.1}
    session.train(model, token_rows(4), **steps)
    with pytest.raises(
        AdapterError, match=r"to undo the training of 'chat', session.reset\('chat'\) restores its init"
    ):
        session.undo()
    before = weights(model, "chat")
    session.train(model, token_rows(4), **steps)
    told = r"to undo the training of 'chat', session.delete\('chat'\), then session.resume\('chat-1'\) goes back to run"
    with pytest.raises(AdapterError, match=told):
        session.undo()
    session.delete("chat")
    session.resume("chat-1", model=model)
    assert same_state(weights(model, "chat"), before)
    with pytest.raises(AdapterExistsError, match=r"another adapter has the name now: rename that one first \(session"):
        session.undo()
