"""The evaluations of a sweep: scores of each adapter, early stopping of each by its own, and both in a resumed run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nbpeft import LoraConfig, get_peft_model, score, sweep, train
from nbpeft.display.html import to_html
from nbpeft.display.numbers import loss
from nbpeft.display.training import training_card
from nbpeft.errors import ConfigError
from nbpeft.runs.folder import RunFolder
from nbpeft.session import Session
from nbpeft.session.commands.pushing import card_facts
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close
from tests.runs.killed import ARGUMENTS, adapted_session, rows, session_in, when_noted
from tests.tiny_models import llama, same_state, state
from tests.training.support import token_rows, trainable

TOKENIZER = CharTokenizer()
ROWS = [{"prompt": f"{number}>", "completion": "ab"} for number in range(8)]
SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 4, "tokenizer": TOKENIZER}
RATES = {"a-lr1e-4": 1e-4, "a-lr5e-2": 0.05}


def model() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
    return get_peft_model(llama(), config, adapter_name="a")


def swept(target: Any, **options: Any) -> Any:
    return train(target, ROWS, learning_rate=sweep(*RATES.values()), **SETTINGS | {"max_steps": 6} | options)


def weights(target: Any, name: str) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in target.manager.parameters(name)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


class AfterEvaluations(TrainerCallback):
    """The weights of each adapter after each evaluation; requests a stop of the run at a step."""

    def __init__(self, target: Any, runs: list[Any] | None = None, stop_at: int = -1) -> None:
        self.target, self.runs, self.stop_at = target, runs, stop_at
        self.kept: dict[tuple[str, int], list[torch.Tensor]] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name in RATES:
            self.kept[name, state.global_step] = weights(self.target, name)
        if self.runs and state.global_step == self.stop_at:
            self.runs[0].control.request_stop("enough")


def test_each_adapter_has_its_scores_and_the_best_one_is_active() -> None:
    plain, watched = model(), model()
    swept(plain)
    result = swept(watched, score=ROWS[:3], metric=["startswith", "loss"], every=3)
    assert same_state(state(plain), state(watched))
    after = score(
        watched, ROWS[:3], metric=["startswith", "loss"], tokenizer=TOKENIZER, adapters=list(RATES), progress=False
    )
    for member in result.members:
        assert [step for step, _ in member.metric_history["startswith"]] == [3, 6]
        assert member.metrics["startswith"] == pytest.approx(after.by("startswith").scores[member.name].value)
        assert_close(member.eval_loss, after.by("loss").scores[member.name].value)
        assert (member.metric, member.score) == ("startswith", -member.metrics["startswith"])
    best = min(result.members, key=lambda member: (-member.metrics["startswith"], member.eval_loss))
    assert result.best == best.name and watched.active_adapters == [best.name]
    assert f"best {best.name} (startswith " in str(result)
    assert result.state.metrics["startswith"] == best.metrics["startswith"]
    shown = to_html(training_card(result.state))
    assert ">startswith<" in shown and "startswith of the best" in shown


def test_an_adapter_with_a_higher_loss_and_a_better_score_is_the_best() -> None:
    seen = {"answers": 0}

    def slowest(answer: str, row: Any) -> float:  # the answers of the first adapter, then those of the second
        seen["answers"] += 1  # before them, it is tried on the reference
        return float(seen["answers"] % 2 == 0)

    result = swept(model(), score=ROWS[:1], metric=slowest, every=6)
    assert result.best == "a-lr1e-4"
    losses = {member.name: member.smoothed_loss for member in result.members}
    assert losses["a-lr1e-4"] > losses["a-lr5e-2"]


def test_metric_for_best_model_decides_between_adapters() -> None:
    calls: list[int] = []

    def measure(predictions: Any) -> dict[str, float]:
        calls.append(1)
        return {"shrinking": float(-len(calls))}

    options = {"eval_strategy": "steps", "eval_steps": 6, "metric_for_best_model": "shrinking"}
    result = swept(model(), eval_data=ROWS[:2], compute_metrics=measure, greater_is_better=True, **options)
    assert result.best == "a-lr1e-4"
    assert [member.metrics["shrinking"] for member in result.members] == [-1.0, -2.0]


@pytest.mark.parametrize("how", ["evaluations", "scores"])
def test_each_adapter_stops_by_its_own_and_gets_its_best_weights_back(how: str) -> None:
    target = trainable(name="a")
    after = AfterEvaluations(target)
    measured = {"eval_data": token_rows(8, 5), "eval_steps": 1, "eval_strategy": "steps"}
    if how == "scores":
        measured = {"score": token_rows(8, 5), "metric": "loss", "every": 1}
    options = {"max_steps": 12, "per_device_train_batch_size": 4, "patience": 2, "callbacks": [after]}
    result = train(target, token_rows(8), learning_rate=sweep(*RATES.values()), **options, **measured)
    for member in result.members:
        losses = dict(member.eval_history)
        best = min(losses, key=lambda step: losses[step])
        assert (member.status, member.step, member.best_step) == ("stopped", best + 2, best)
        assert (member.eval_loss, member.eval_step) == (losses[best], best)
        assert equal(weights(target, member.name), after.kept[member.name, best])
        words = f"{member.name} stopped early (no improvement in 2 evaluations), with the weights of step {best}"
        assert words in result.message
    assert len({member.step for member in result.members}) == 2


def test_the_last_adapter_to_stop_ends_the_sweep() -> None:
    rows = [{**row, "choices": ["ab", "cd"], "answer": 0} for row in ROWS[:2]]
    result = swept(model(), score=rows, metric="choice", every=1, patience=1, max_steps=30)
    assert result.steps == 2
    assert [member.status for member in result.members] == ["stopped", "stopped"]


def test_a_resumed_sweep_has_its_curves_and_its_best_weights(tmp_path: Path) -> None:
    session, target, runs = Session(), trainable(name="a"), []
    session.context.chosen_runs_folder = str(tmp_path)
    session.register(target, name="model")
    session.on_run(lambda run, name: runs.append(run))
    given: dict[str, Any] = {"score": token_rows(8, 5), "metric": "loss", "every": 1, "patience": 4}
    stopping = AfterEvaluations(target, runs, stop_at=6)
    rows = token_rows(8)
    rates = sweep(*RATES.values())
    options: dict[str, Any] = {"max_steps": 12, "per_device_train_batch_size": 4, "callbacks": [stopping]}
    first = session.train(target, rows, learning_rate=rates, **options, **given)
    losses = dict(first.members[1].eval_history)
    best = min(losses, key=lambda step: losses[step])
    assert best < 6 and list(losses) == [1, 2, 3, 4, 5, 6]
    assert "the best weights were restored: a-lr5e-2 of step" in first.message
    (folder,) = tmp_path.glob("a-sweep-*")
    logged = [entry for entry in RunFolder(folder).entries() if "eval_loss/a-lr5e-2" in entry]
    assert {entry["step"]: entry["eval_loss/a-lr5e-2"] for entry in logged} == losses
    result = session.resume(data=rows, model=target, score=given["score"], callbacks=[]).training
    fast = result.members[1]
    assert (fast.status, fast.best_step, fast.eval_step) == ("stopped", best, best)
    measured = [step for step, _ in fast.eval_history]
    assert measured[:6] == [1, 2, 3, 4, 5, 6] and len(measured) == best + 4
    assert equal(weights(target, fast.name), stopping.kept[fast.name, best])


def stopped_after(step: int, run: Any, name: str) -> None:
    if step:
        when_noted(run, step, run.control.request_stop)


def test_a_resumed_sweep_knows_the_best_evaluation_of_an_adapter_that_stopped_early(tmp_path: Path) -> None:
    given: dict[str, Any] = {"patience": 2, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 8}
    held, found = rows()[:6], []
    for stop in (0, 5):
        session, target = adapted_session(tmp_path / f"{stop}")
        end = session.on_run(partial(stopped_after, stop))
        options = {**ARGUMENTS, **given, "gradient_accumulation_steps": 1, "lr_scheduler_type": "linear"}
        result = session.train(target, rows(), held, **options | {"learning_rate": sweep(0.01, 3.0)})
        end()
        if stop:
            assert [member.status for member in result.members] == ["stopped", "stopped"] and result.steps == stop
            again = {"model": llama(), "variable": "model", "data": rows(), "eval_data": held}
            resumed = session_in(tmp_path / f"{stop}").resume(**again)
            result, target = resumed.training, resumed.model
        shown = [(one.status, one.eval_step, one.eval_loss, one.best_step, one.score) for one in result.members]
        found.append((result.best, shown, target.active_adapters, weights(target, "sql-lr3")))
    assert [status for status, *_ in found[0][1]] == ["finished", "stopped"]
    assert found[1][:3] == found[0][:3] and equal(found[1][3], found[0][3])


def test_the_model_card_of_an_adapter_has_its_own_scores() -> None:
    session, target = Session(), model()
    session.register(target, name="model")
    given = {"score": ROWS[:2], "metric": ["startswith", "loss"], "every": 2, "keep": False, "max_steps": 2}
    result = session.train(target, ROWS, learning_rate=sweep(*RATES.values()), **SETTINGS | given)
    for member in result.members:
        facts = card_facts(session.context.models.get("model"), member.name, "me/adapter", "Adapter")
        rows = dict(facts.training)
        assert rows["startswith"] == f"{member.metrics['startswith']:.4g}"
        assert rows["evaluation loss at step 2"] == loss(member.eval_loss)
    assert len({member.eval_loss for member in result.members}) == 2


HALVED = {"a-lr1e-6": 1e-6, "a-lr1e-5": 1e-5, "a-lr2e-2": 0.02, "a-lr5e-2": 0.05}


@pytest.mark.parametrize("measured", [{"eval_data": token_rows(5, 5)}, {"score": token_rows(5, 5), "metric": "loss"}])
def test_the_worse_half_is_stopped_and_the_others_learn_the_same(measured: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("nbpeft.sweeps.TOKENS_TOGETHER", 1)  # a pass for each, whose bits depend on no other adapter
    given = {"max_steps": 8, "per_device_train_batch_size": 4, **measured}
    given |= {"every": 2} if "score" in measured else {}
    halved, whole = trainable(name="a", lora_dropout=0.3), trainable(name="a", lora_dropout=0.3)
    result = train(halved, token_rows(16), learning_rate=sweep(*HALVED.values(), halving=True), **given)
    given |= {} if "score" in measured else {"eval_strategy": "steps", "eval_steps": 2}
    full = train(whole, token_rows(16), learning_rate=sweep(*HALVED.values()), **given)
    losses = {member.name: dict(member.eval_history) for member in full.members}
    first = sorted(HALVED, key=lambda name: losses[name][2])[:2]
    best = min(first, key=lambda name: losses[name][4])
    ended = {name: 8 if name == best else 4 if name in first else 2 for name in HALVED}
    assert {member.name: member.step for member in result.members} == ended
    assert result.best == best
    assert {member.status for member in result.members if member.name != best} == {"stopped"}
    worse = ", ".join(name for name in HALVED if name not in first)
    assert f"stopped at step 2 as the worse of 4 adapters: {worse}" in result.message
    assert equal(weights(halved, best), weights(whole, best))
    for member in result.members:
        assert member.history == next(one.history[: member.step] for one in full.members if one.name == member.name)


def test_evaluations_do_not_change_what_an_adapter_learns_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr("nbpeft.sweeps.TOKENS_TOGETHER", 1)
    given: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "eval_data": token_rows(5, 5)}
    given |= {"eval_strategy": "steps", "eval_steps": 1}
    together = trainable(name="a", lora_dropout=0.3)
    train(together, token_rows(8), learning_rate=sweep(*RATES.values()), **given)
    for name, rate in RATES.items():
        alone = trainable(name="a", lora_dropout=0.3)
        train(alone, token_rows(8), learning_rate=rate, **given)
        assert equal(weights(together, name), weights(alone, "a"))


def test_none_is_stopped_by_an_evaluation_at_the_end() -> None:
    given = {"max_steps": 2, "eval_data": token_rows(5, 5), "eval_strategy": "steps", "eval_steps": 2}
    result = train(trainable(name="a"), token_rows(4), learning_rate=sweep(*RATES.values(), halving=True), **given)
    assert [(member.status, member.step) for member in result.members] == [("finished", 2)] * len(RATES)
    assert "stopped" not in result.message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": sweep(0.1, 0.2), "halving": True}, "halving=True needs evaluations"),
        ({"learning_rate": sweep(0.1, 0.2, halving=True), "eval_strategy": "no"}, "halving=True needs evaluations"),
        ({"halving": True, "eval_data": 2}, "halving=True has no effect without a sweep"),
    ],
)
def test_halving_needs_a_sweep_and_evaluations(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(trainable(name="a"), token_rows(8), max_steps=1, **arguments)
    with pytest.raises(ConfigError, match="halving must be True or False"):
        sweep(1, 2, halving="third")  # type: ignore[arg-type]
