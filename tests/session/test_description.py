"""The state of a session as JSON of limited size."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from nbpeft import NbpeftError, TrainResult
from nbpeft.session import Session
from nbpeft.session.context import SessionContext
from nbpeft.session.description import MOST_BYTES, describe
from nbpeft.state import MemberState, PastState, SessionState
from tests.tiny_models import llama
from tests.widgets.fakes import ADAPTERS, model, train_state

LORA = {"r": 2, "target_modules": ["q_proj"]}


class Context:
    """As much of a session's context as is described."""

    def __init__(self, state: SessionState, **attributes: Any) -> None:
        self.state, self.last_result, self.last_error, self.runs_folder = state, None, None, None
        vars(self).update(attributes)


def described(state: SessionState, **attributes: Any) -> dict[str, Any]:
    text = describe(Context(state, **attributes))  # type: ignore[arg-type]
    assert len(text.encode()) <= MOST_BYTES
    told = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert isinstance(told, dict)
    return told


def test_a_session_describes_itself(session: Session) -> None:
    empty = json.loads(session.describe())
    assert empty["models"] == [] and empty["current"] is empty["last_error"] is empty["last_result"] is None
    added = session.add(llama(), LORA, name="sql", variable="model")
    assert added.model is not None  # the result keeps the model alive
    with pytest.raises(NbpeftError) as failed:
        session.use("sqk")
    session.note_failure(failed.value)
    told = json.loads(session.describe())
    (one,) = told["models"]
    assert told["current"] == one["name"] == "model" and one["class"] == "LlamaForCausalLM"
    (adapter,) = one["adapters"]
    assert (adapter["name"], adapter["method"], adapter["active"]) == ("sql", "LoRA", True)
    assert "r=2" in adapter["settings"] and adapter["targets"] == "q_proj"
    assert told["last_error"]["code"] == "unknown-adapter" and "sqk" in told["last_error"]["message"]


def test_what_is_in_use_comes_first_and_the_rest_is_counted() -> None:
    many = [dataclasses.replace(ADAPTERS[1], name=f"adapter {number}", active=number == 700) for number in range(1000)]
    state = SessionState((model("other"), model("model", tuple(many))), "model")
    told = described(state)
    first = told["models"][0]
    assert first["name"] == "model" and first["adapters"][0]["name"] == "adapter 700"
    assert len(first["adapters"]) + first["adapters_left_out"] == 1000 and len(first["adapters"]) > 1
    told = described(SessionState(tuple(model(f"model {number}") for number in range(100)), "model 70"))
    assert told["models"][0]["name"] == "model 70"
    assert len(told["models"]) + told["models_left_out"] == 100


@pytest.mark.parametrize("word", ["\x01", "🦙", '"', "\ud800"])
def test_any_state_fits(word: str) -> None:
    long = word * 200
    run = dataclasses.replace(
        train_state(3, 40, adapter=long, message=long),
        metrics={f"{number}{long}": 0.5 for number in range(100)},
        folder=long,
        members=tuple(MemberState(long, "training", 1) for _ in range(100)),
    )
    adapters = tuple(dataclasses.replace(ADAPTERS[0], name=long, summary={long: long}) for _ in range(9))
    one = dataclasses.replace(model(long, adapters), training=run, class_name=long, quantization=long)
    state = SessionState((one,) * 9, long, busy=long, notes=(long,) * 20, past=(PastState(long, long),) * 20)
    error = NbpeftError(long, **{f"name{number}": [long] * 50 for number in range(20)}).to_dict()
    result = TrainResult("finished", long, 40, 40, float("nan"), None, 1.0, 9, None, long, run)
    told = described(state, last_error=error, last_result=result, runs_folder=long)
    assert told["models_left_out"] == 8 and told["last_result"]["loss"] is None


def test_it_is_there_while_a_command_runs() -> None:
    context = SessionContext()
    with context.command("merging", slow=True):
        assert json.loads(describe(context))["busy"] == "merging"
