"""Commands of a session without IPython."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbpeft.errors import AdapterError, BusyError, ConfigError, NbpeftError, TargetError
from nbpeft.model import LoraConfig, get_peft_model
from nbpeft.session import Session
from nbpeft.state import SessionState
from tests.tiny_models import llama
from tests.waiting import PATIENCE

FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def model(session: Session) -> Any:
    return session.add(llama(), FIELDS, name="sql", variable="model").model


def in_thread(work: Callable[[], object]) -> BaseException | None:
    """Runs something in another thread; gives what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    return raised[0] if raised else None


def test_a_script_does_what_cells_do(session: Session) -> None:
    base = llama()
    result = session.add(base, LoraConfig(r=4, target_modules=["q_proj"]))
    print(result)
    model = result.model
    assert model.get_base_model() is base
    assert session.model() is model
    assert session.names == ("model",)
    assert session.unload().base is base


def test_a_shown_result_finds_the_model_as_long_as_the_base_lives(session: Session) -> None:
    base = llama()
    result = session.add(base, FIELDS)
    result._repr_html_()
    gc.collect()
    assert result.model.get_base_model() is base
    reference = weakref.ref(base)
    del base
    gc.collect()
    assert reference() is None
    with pytest.raises(AdapterError, match="is gone"):
        _ = result.model


def test_the_state_is_plain_data(session: Session, model: Any) -> None:
    state = session.state
    assert json.loads(json.dumps(dataclasses.asdict(state)))["models"][0]["name"] == "model"
    shown = state.models[0]
    assert (shown.class_name, shown.dtype, shown.device) == ("LlamaForCausalLM", "float32", "cpu")
    assert (shown.trainable_count, shown.parameter_count) == model.get_nb_trainable_parameters()
    (adapter,) = shown.adapters
    assert (adapter.name, adapter.method, dict(adapter.summary)) == ("sql", "LoRA", {"r": "4", "α": "8"})
    assert (adapter.module_count, adapter.targets) == (4, ("q_proj", "v_proj"))
    assert adapter.byte_count == 4 * adapter.parameter_count == 4 * shown.trainable_count
    assert (adapter.active, adapter.trainable, adapter.merged) == (True, True, False)


@pytest.mark.parametrize(
    ("fields", "label"), [({"use_dora": True}, "DoRA"), ({"use_rslora": True}, "rsLoRA"), ({}, "LoRA")]
)
def test_methods_are_called_what_people_call_them(session: Session, fields: dict[str, Any], label: str) -> None:
    result = session.add(llama(), FIELDS | fields)
    assert result.adapter.method == label


def test_mixed_ranks_are_said(session: Session) -> None:
    result = session.add(llama(), FIELDS | {"rank_pattern": {"q_proj": 2}})
    assert result.adapter.summary["r"] == "4*" and result.adapter.summary["α"] == "8"


def test_counts_follow_switching(session: Session, model: Any) -> None:
    session.add(model, {"r": 2, "target_modules": ["q_proj"]}, name="chat")
    for names in ("sql", "chat", ["sql", "chat"]):
        session.use(names)
        shown = session.state.models[0]
        assert (shown.trainable_count, shown.parameter_count) == model.get_nb_trainable_parameters()
    session.delete("chat")
    assert session.state.models[0].parameter_count == model.get_nb_trainable_parameters()[1]


def test_a_change_made_in_python_is_published(session: Session, model: Any) -> None:
    session.add(model, FIELDS, name="chat")
    before, seen = session.state, list[SessionState]()
    session.subscribe(seen.append)
    model.set_adapter("sql")
    assert before.models[0].active == ("chat",)
    assert [state.models[0].active for state in seen] == [("sql",)]
    assert seen[-1].revision > before.revision


def test_a_command_publishes_what_it_did_last(session: Session, model: Any) -> None:
    seen: list[SessionState] = []
    session.subscribe(seen.append)
    session.use("sql")
    assert len(seen) == 1
    session.merge()
    assert [state.busy for state in seen[1:]] == ["merging", ""]
    assert seen[-1].models[0].merged == ("sql",)


def test_what_is_merged_acts_alone(session: Session, model: Any) -> None:
    session.add(model, FIELDS, name="chat")
    session.use(["sql", "chat"])
    session.merge("sql")
    state = session.state.models[0]
    assert state.active == state.merged == ("sql",)
    assert [item.name for item in state.adapters if item.active] == ["sql"]
    session.unmerge()
    assert session.state.models[0].active == ("sql", "chat")


def test_revisions_grow(session: Session, model: Any) -> None:
    revisions: list[int] = []
    session.subscribe(lambda state: revisions.append(state.revision))
    session.use("base")
    session.use("sql")
    session.use("sql")
    assert revisions == sorted(set(revisions))
    assert len(revisions) == 3


def test_a_subscriber_that_fails_breaks_nothing(session: Session, model: Any) -> None:
    def fail(state: SessionState) -> None:
        raise ValueError("no paint")

    session.subscribe(fail)
    seen: list[SessionState] = []
    session.subscribe(seen.append)
    session.use("base")
    session.use("base")
    assert len(seen) == 2
    notes = session.state.notes
    assert len(notes) == 1
    assert "no paint" in notes[0]


def test_bound_methods_are_held_weakly(session: Session, model: Any) -> None:
    class Panel:
        drawn = 0

        def draw(self, state: SessionState) -> None:
            type(self).drawn += 1

    panel = Panel()
    session.subscribe(panel.draw)
    session.use("base")
    assert Panel.drawn == 1
    del panel
    gc.collect()
    session.use("sql")
    assert Panel.drawn == 1


def test_unsubscribing(session: Session, model: Any) -> None:
    seen: list[SessionState] = []
    session.subscribe(seen.append)()
    session.use("base")
    assert seen == []


def test_another_thread_is_told_what_runs(session: Session, model: Any) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait(state: SessionState) -> None:
        if state.busy:
            inside.set()
            assert go_on.wait(PATIENCE)

    session.subscribe(wait)
    worker = threading.Thread(target=session.merge)
    worker.start()
    try:
        assert inside.wait(PATIENCE)
        with pytest.raises(BusyError, match="busy: merging"):
            session.use("base")
        assert session.state.busy == "merging"
        assert session.state.models[0].name == "model"
    finally:
        go_on.set()
        worker.join(PATIENCE)
    assert session.state.busy == ""
    session.unmerge()


def test_a_running_loop_keeps_other_threads_out(session: Session, model: Any) -> None:
    with session.start_run(model, 2) as run:
        error = in_thread(lambda: session.use("sql"))
        assert isinstance(error, BusyError)
        assert "training sql" in str(error)
        assert session.state.busy == "training sql"
        assert session.control() is run.control
        session.use("sql")
    assert in_thread(lambda: session.use("sql")) is None
    assert session.control() is None


def test_a_loop_that_was_dropped_keeps_nobody_out(session: Session, model: Any) -> None:
    run = session.start_run(model, 2)
    run.begin()
    assert isinstance(in_thread(lambda: session.use("sql")), BusyError)
    session.context.runs.clear()
    del run
    gc.collect()
    assert in_thread(lambda: session.use("sql")) is None


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (lambda s, m: s.add(m, FIELDS | {"target_modules": ["nope"]}, name="x"), TargetError),
        (lambda s, m: s.add(m, FIELDS | {"nope": 1}, name="x"), ConfigError),
        (lambda s, m: s.add(m, FIELDS | {"r": 0}, name="sql"), ConfigError),
        (lambda s, m: s.add(m, FIELDS | {"target_modules": ["q_proj", "nope"]}, name="sql"), TargetError),
        (lambda s, m: s.add(m, FIELDS, name="a.b"), NbpeftError),
        (lambda s, m: s.use(["sql", "nope"]), NbpeftError),
        (lambda s, m: s.rename("sql", "sql"), NbpeftError),
        (lambda s, m: s.save("/proc/nope/x"), NbpeftError),
        (lambda s, m: s.load("/nope"), NbpeftError),
        (lambda s, m: s.use("sql", model="nope"), AdapterError),
        (lambda s, m: s.use("sql", model=torch.nn.Linear(1, 1)), AdapterError),
        (lambda s, m: s.preview(m, FIELDS | {"target_modules": ["nope"]}), TargetError),
    ],
)
def test_a_failed_command_changes_nothing(
    session: Session, model: Any, command: Callable[[Session, Any], object], kind: type[Exception]
) -> None:
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    models, config = session.state.models, model.peft_config["sql"]
    with pytest.raises(kind) as caught:
        command(session, model)
    assert "\n" not in str(caught.value)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert session.state.models == models
    assert model.peft_config["sql"] is config
    assert session.state.busy == ""


def test_models_are_named_in_errors(session: Session, model: Any) -> None:
    with pytest.raises(
        AdapterError, match=r"no adapted model is called 'modle'; there is: model\. Did you mean 'model'"
    ):
        session.model("modle")


def test_a_model_without_a_name_gets_one(session: Session) -> None:
    kept = [session.add(llama(), FIELDS).model for _ in range(3)]
    assert session.names == ("model", "model2", "model3")
    assert session.model("model2") is kept[1]
    assert session.state.current == "model3"
    session.use("default", model="model")
    assert session.state.current == "model"


def test_models_are_held_weakly(session: Session) -> None:
    model = session.add(llama(), FIELDS).model
    session.memory()
    _ = session.state
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert session.state.models == ()
    assert session.state.current is None


def test_unloading_in_python_is_noticed(session: Session, model: Any) -> None:
    seen: list[SessionState] = []
    session.subscribe(seen.append)
    base = model.unload()
    assert seen[-1].models == ()
    assert session.add(base, FIELDS).model is not model


def test_a_handle_that_was_taken_over_is_replaced(session: Session, model: Any) -> None:
    base = model.get_base_model()
    with pytest.warns(UserWarning, match="already carries"):
        other = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), "chat")
    session.register(other, name="model")
    assert session.model("model") is other
    assert len(session.state.models) == 1


def test_adopting_variables(session: Session) -> None:
    mine = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    session.adopt({"mine": mine, "_hidden": mine, "number": 3, "same": mine})
    assert session.names == ("mine",)


def test_memory_is_part_of_the_state_once_measured(session: Session, model: Any) -> None:
    assert session.state.models[0].memory is None
    measured = session.memory()
    assert session.state.models[0].memory is measured
    adapters = next(part.byte_count for part in measured.parts if part.name == "adapters")
    assert adapters == session.state.models[0].adapters[0].byte_count


def test_casting_by_hand_is_seen(session: Session, model: Any) -> None:
    model.to(torch.bfloat16)
    shown = session.state.models[0]
    assert shown.dtype == "bfloat16"
    assert shown.adapters[0].byte_count == 2 * shown.adapters[0].parameter_count


def test_unfreezing_by_hand_is_seen_after_a_refresh(session: Session, model: Any) -> None:
    model.get_base_model().lm_head.weight.requires_grad_(True)
    assert session.refresh().models[0].trainable_count == model.get_nb_trainable_parameters()[0]


def test_doctor_reports_versions() -> None:
    report = Session().doctor()
    assert {"python", "torch", "transformers", "bitsandbytes", "ipywidgets", "ipykernel"} <= {
        check.name for check in report.checks
    }
    assert report.problems == ()


class Wide(torch.nn.Module):
    """1,001 linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(1001))


def test_a_state_without_news_costs_nothing(session: Session) -> None:
    model = session.add(Wide(), {"r": 1, "target_modules": r"layers\.\d+"}).model
    before = session.state.models[0]
    assert before.adapters[0].module_count == 1001
    calls: list[str] = []
    sys.setprofile(lambda _frame, event, _argument: calls.append(event))
    try:
        again = session.state.models[0]
    finally:
        sys.setprofile(None)
    assert again is before and 0 < len(calls) < 1000, "not even a call for each layer"
    del model


def test_adding_always_makes_the_adapter_the_active_one(session: Session) -> None:
    model = session.add(llama(), {"r": 2}, name="a", variable="model").model
    session.add(model, {"r": 2}, name="b")
    for before in (lambda: None, lambda: session.use(["a", "b"]), lambda: session.use("base")):
        for name, config in (("b", {"r": 2}), ("a", {"r": 2}), ("a", {"r": 4}), ("a", {"r": 2}), ("c", {"r": 2})):
            before()
            result = session.add(model, config, name=name)
            assert model.manager.active == (name,) and model.manager.enabled and result.adapter.active
        session.delete("c")


def test_fields_without_a_method_keep_that_of_the_adapter(session: Session) -> None:
    result = session.add(llama(), {"peft_type": "ia3"}, name="scales", variable="model")
    model = result.model
    with pytest.raises(ConfigError, match=r"no field 'r'\. peft_type='LORA' has it, and so do \d+ others\."):
        session.add(model, {"r": 16}, name="scales")
    with pytest.raises(ConfigError, match="has no field 'r'"):
        session.preview("model", {"r": 16}, name="scales")
    assert session.add(model, {}, name="scales").unchanged
    assert session.add(model, {"target_modules": ["k_proj"]}, name="scales").reconfigured
    assert model.peft_config["scales"].peft_type == "IA3"
    assert session.add(model, {"peft_type": "lora", "r": 2}, name="scales").reconfigured
    assert model.peft_config["scales"].r == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "token_indices is empty"),
        ({"token_indices": [1000]}, r"token_indices: model.embed_tokens has \d+ rows and no row 1000"),
        ({"token_indices": [1], "target_modules": ["zz"]}, "Target modules 'zz' not found in the base model"),
    ],
)
def test_trainable_tokens_name_their_own_fields(session: Session, fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, TargetError), match=f"^{message}"):
        session.add(llama(), {"peft_type": "trainable_tokens", **fields}, variable="model")
