"""Adapters with rows of their own: each learns what it would alone, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainerCallback

import nbpeft
from nbpeft import LoraConfig, sweep, train
from nbpeft.display.html import to_html
from nbpeft.display.training import training_card
from nbpeft.engine.changes.random_numbers import drawing_from
from nbpeft.errors import ConfigError, TrainingError, TrainingInterrupted
from nbpeft.session import Session
from nbpeft.training import RunControl, SweepResult
from nbpeft.training.sweep.rows import draw_apart
from tests.char_tokenizer import CharTokenizer
from tests.training.support import token_rows, trainable

ROWS = {"a": token_rows(8, 1), "b": token_rows(13, 2)}
GIVEN: dict[str, Any] = {"per_device_train_batch_size": 3, "learning_rate": 0.02, "weight_decay": 0.1, "seed": 3}

STREAM = datasets.Dataset.from_list(ROWS["b"]).to_iterable_dataset()
EVALUATED: dict[str, Any] = {"eval_data": 3, "eval_strategy": "steps", "eval_steps": 2}


def two(**config: Any) -> Any:
    model = trainable(name="a", **config)
    model.manager.copy("a", "b")
    return model


def weights(model: Any, name: str) -> list[torch.Tensor]:
    return [part.detach().clone() for part in model.manager.parameters(name)]


def alone(name: str, config: dict[str, Any], **arguments: Any) -> tuple[list[torch.Tensor], Any]:
    """The weights and the result of a training of one adapter on its rows."""
    model = two(**config)
    result = train(model, ROWS[name], adapter=name, **GIVEN | arguments)
    return weights(model, name), result


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({}, {"num_train_epochs": 2}),
        ({"lora_dropout": 0.3}, {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}),
        ({"lora_dropout": 0.3}, {"max_steps": 7, "train_sampling_strategy": "random", **EVALUATED}),
        ({"use_dora": True}, {"num_train_epochs": 1.5, "lr_scheduler_type": "cosine", "warmup_steps": 2}),
        ({}, {"num_train_epochs": 2, "packing": True, "max_length": 24}),
    ],
    ids=["epochs", "accumulated", "evaluated", "dora", "packed"],
)
def test_each_learns_what_it_would_alone_bit_by_bit(config: dict[str, Any], arguments: dict[str, Any]) -> None:
    model = two(**config)
    result = train(model, ROWS, **GIVEN | arguments)
    for member in result.members:
        expected, once = alone(member.name, config, **arguments)
        assert all(map(torch.equal, weights(model, member.name), expected))
        assert member.history == once.state.history
        assert (member.status, member.step) == ("finished", once.steps)


def test_adapters_of_a_sweep_that_draw_differently_learn_what_they_would_alone() -> None:
    model, rates = trainable(name="a"), (0.3, 0.0)
    given = GIVEN | {"max_steps": 6, "eval_data": 3, "eval_strategy": "steps", "eval_steps": 3}
    result = train(model, ROWS["a"], lora_dropout=sweep(*rates), **given)
    assert isinstance(result, SweepResult) and model.active_adapters == [result.best]
    for member, rate in zip(result.members, rates, strict=True):
        own = trainable(name="other")
        with drawing_from(GIVEN["seed"]):
            changed = replace(own.manager.configs["other"], lora_dropout=rate)
            own.manager.add(member.name, changed, trainable=True, select=False)
        once = train(own, ROWS["a"], adapter=member.name, **given)
        assert all(map(torch.equal, weights(model, member.name), weights(own, member.name)))
        assert (member.history, member.eval_history) == (once.state.history, once.state.eval_history)


@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [
        ({}, {"r": 2}, False),
        ({"lora_dropout": 0.1}, {"lora_dropout": 0.3, "r": 2, "lora_alpha": 1}, False),
        ({"lora_dropout": 0.1}, {}, True),
        ({"lora_dropout": 0.1}, {"lora_dropout": 1.0}, True),
        ({"lora_dropout": 0.1}, {"lora_dropout": 0.1, "target_modules": ["v_proj"]}, True),
    ],
)
def test_adapters_draw_apart_if_their_numbers_differ(first: Any, second: Any, apart: bool) -> None:
    configs = [LoraConfig(**{"target_modules": ["q_proj"]} | given) for given in (first, second)]
    assert draw_apart(configs) is apart


class At(TrainerCallback):
    """Does something at the beginning of a step, or of its second batch."""

    def __init__(self, step: int, act: Any, *, inside: bool = False) -> None:
        self.step, self.act, self.inside = step, act, inside

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.inside and state.global_step == self.step:
            self.act()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.inside and state.global_step == self.step:
            self.act()


def test_no_adapter_is_the_best_and_the_active_one_stays_active() -> None:
    model = two()
    model.manager.activate("b")
    result = train(model, ROWS, num_train_epochs=1, **GIVEN)
    assert isinstance(result, SweepResult) and (result.best, result.best_fields) == ("", {})
    assert model.active_adapters == ["b"] and result.state.best_member is None
    short, long = result.members
    assert (short.step, long.step, result.steps) == (3, 5, 5)
    assert str(result).startswith("2 adapters finished") and "a (loss " in str(result) and "best" not in str(result)
    assert "best" not in to_html(training_card(result.state))


def test_each_is_evaluated_on_its_own_rows() -> None:
    model, held = two(), {"a": token_rows(5, 8), "b": token_rows(4, 9)}
    given = {"eval_strategy": "steps", "eval_steps": 4, "num_train_epochs": 1}
    result = train(model, ROWS, held, **GIVEN | given)
    short, long = result.members
    assert [step for step, _ in short.eval_history] == [3] and [step for step, _ in long.eval_history] == [4, 5]
    for member in result.members:
        once = alone(member.name, {}, eval_data=held[member.name], **given)[1]
        assert member.eval_history == once.state.eval_history


def test_each_may_have_fields_of_its_own() -> None:
    model = two()
    fields: dict[str, Any] = {"a": {"learning_rate": 0.05}, "b": {"weight_decay": 0.0}}
    train(model, ROWS, members=fields, num_train_epochs=1, **GIVEN)
    for name, own in fields.items():
        assert all(map(torch.equal, weights(model, name), alone(name, {}, num_train_epochs=1, **own)[0]))


def test_rows_of_one_adapter_are_a_training_of_it() -> None:
    model = two()
    result = train(model, {"b": ROWS["b"]}, num_train_epochs=1, **GIVEN)
    assert not isinstance(result, SweepResult) and model.active_adapters == ["b"]
    assert all(map(torch.equal, weights(model, "b"), alone("b", {}, num_train_epochs=1)[0]))


def test_the_last_one_to_end_ends_the_training() -> None:
    model, control = two(), RunControl()
    stop = At(1, lambda: control.request_stop_of("b"))
    result = train(model, ROWS, num_train_epochs=1, control=control, callbacks=[stop], **GIVEN)
    assert [(member.status, member.step) for member in result.members] == [("finished", 3), ("stopped", 2)]
    assert result.steps == 3
    assert all(map(torch.equal, weights(model, "a"), alone("a", {}, num_train_epochs=1)[0]))


def test_a_clone_is_trained_on_the_rows_of_its_adapter() -> None:
    config: dict[str, Any] = {"lora_dropout": 0.3}
    model, control = two(**config), RunControl()
    clone = At(2, lambda: control.request_clone_of("b", "c", max_grad_norm=0.0))
    rows = {"a": ROWS["a"], "b": ROWS["b"]}
    result = train(model, rows, num_train_epochs=2, max_grad_norm=0.0, control=control, callbacks=[clone], **GIVEN)
    assert [(member.name, member.step) for member in result.members] == [("a", 6), ("b", 10), ("c", 10)]
    assert all(map(torch.equal, weights(model, "c"), weights(model, "b")))


@pytest.mark.parametrize(("step", "inside"), [(1, True), (5, False)])
def test_an_interrupted_training_is_resumed_with_the_same_bits(step: int, inside: bool, tmp_path: Path) -> None:
    config: dict[str, Any] = {"lora_dropout": 0.3}
    given = GIVEN | {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    whole = two(**config)
    train(whole, ROWS, **given)
    session, model = Session(), two(**config)
    session.context.chosen_runs_folder = str(tmp_path)
    session.register(model, name="model")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted) as caught:
        session.train(model, ROWS, callbacks=[At(step, interrupt, inside=inside)], **given)
    short = ("finished", 4) if step == 5 else ("stopped", 1)
    members = caught.value.result.members  # type: ignore[attr-defined]
    assert [(member.status, member.step) for member in members] == [short, ("stopped", step)]
    with pytest.raises(TrainingError, match="was trained with other rows"):
        session.resume(data={"a": ROWS["b"][:8], "b": ROWS["b"]}, model=model, callbacks=[])
    session.resume(data=ROWS, model=model, callbacks=[])
    for name in ROWS:
        assert all(map(torch.equal, weights(model, name), weights(whole, name)))


@pytest.mark.parametrize(
    ("data", "arguments", "words"),
    [
        ({"a": ROWS["a"], "c": ROWS["b"]}, {}, "data has rows for 'c', which the model does not have"),
        ({"a": {"x": []}, "b": ROWS["b"]}, {}, "the rows of 'a' in data are a dictionary"),
        (ROWS, {"eval_data": {"a": ROWS["a"]}}, "data has rows for 'a', 'b', but the evaluation rows are those of 'a'"),
        (ROWS, {"eval_data": {"a": ROWS["a"], "b": None}}, "there are no evaluation rows for 'b'"),
        (ROWS, {"members": {"a": {}, "c": {}}}, "but the adapters to train are 'a', 'c'"),
        (
            {"b": ROWS["b"]},
            {"members": {"a": {}, "b": {}}},
            "rows for 'b', but the adapters to train are 'a', 'b'",
        ),
        ({"text": ["some text"]}, {"members": {"a": {}, "b": {}}}, "found a dictionary with 'text'"),
        (ROWS, {"lerning_rate": 0.1}, "learning_rate"),
        (ROWS, {"adapter": "a"}, "adapter cannot be combined with rows for each adapter"),
        (ROWS, {"processes": 2}, "processes cannot be combined with rows for each adapter"),
        (ROWS, {"learning_rate": sweep(0.1, 0.2)}, "learning_rate is a sweep, but data has rows for each adapter"),
        (ROWS, {"halving": True, "eval_data": 2}, "halving=True compares adapters, but each has rows of its own"),
        (ROWS, {"sample": "x"}, "sample needs a tokenizer|sample cannot be combined with several adapters"),
        (ROWS, {"dataloader_drop_last": True, "per_device_train_batch_size": 9}, "the rows of 'a' do not fill a batch"),
        ({"a": ROWS["a"], "b": []}, {}, "no rows"),
        ({"a": ROWS["a"], "b": STREAM}, {"max_steps": 2}, "the rows of 'b' are a stream"),
        ({"a": ROWS["a"], "b": [{"input_ids": [10**6]}]}, {}, "rows of 'b': "),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(data: Any, arguments: Any, words: str) -> None:
    model = two()
    before = {name: weights(model, name) for name in ROWS}
    with pytest.raises((ConfigError, TrainingError), match=words):
        train(model, data, **GIVEN | arguments)
    assert model.active_adapters == ["a"]
    assert all(all(map(torch.equal, weights(model, name), kept)) for name, kept in before.items())


def test_rows_for_different_objectives_are_refused() -> None:
    pairs = [{"prompt": "p", "chosen": "good", "rejected": "bad"}] * 3
    texts = [{"text": "some text"}] * 3
    with pytest.raises(ConfigError, match="the rows of 'a' are for dpo, those of 'b' for sft"):
        train(two(), {"a": pairs, "b": texts}, tokenizer=CharTokenizer(), max_steps=1)


def test_the_example_of_the_documentation_runs() -> None:
    lines = (train.__doc__ or "").partition("same base model::")[2].strip().splitlines()[:2]
    model = trainable(name="sql")
    model.manager.copy("sql", "chat")
    names: dict[str, Any] = {"nbpeft": nbpeft, "model": model, "tokenizer": None}
    names |= {"queries": ROWS["a"], "dialogs": ROWS["b"]}
    exec("\n".join(map(str.strip, lines)), names)
    assert (names["sql"].step, names["chat"].step) == (1, 2)
