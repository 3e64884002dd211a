"""Scores during a training: a curve like that of an evaluation, early stopping by it, and no other effect."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.trainer_callback import TrainerControl, TrainerState

from nbpeft import LoraConfig, get_peft_model, score, sweep, train
from nbpeft.display.html import to_html
from nbpeft.display.numbers import metric
from nbpeft.errors import ConfigError, TrainingError, TrainingInterrupted
from nbpeft.runs.store import RunStore
from nbpeft.scoring.in_training import MOST_ANSWERS, RowScorer
from nbpeft.session import Session
from nbpeft.training.disk.kept_arguments import to_keep, to_take_over
from nbpeft.training.monitor.callback import RunCallback
from nbpeft.training.monitor.control import RunControl
from nbpeft.training.monitor.run import Run
from nbpeft.training.request import TrainRequest
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close
from tests.tiny_models import llama, same_state, state

TOKENIZER = CharTokenizer()
ROWS = [{"prompt": f"{number}>", "completion": "ab"} for number in range(8)]
HELD_OUT = ROWS[:3]
SETTINGS: dict[str, Any] = {"learning_rate": 0.05, "per_device_train_batch_size": 4, "tokenizer": TOKENIZER}


def model() -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
    torch.manual_seed(0)
    return get_peft_model(llama(), config)


def trained(target: Any = None, **options: Any) -> Any:
    return train(model() if target is None else target, ROWS, **SETTINGS | {"max_steps": 6} | options)


def test_the_scores_are_those_of_the_model_at_that_time_and_change_nothing() -> None:
    plain, watched = model(), model()
    expected = trained(plain)
    result = trained(watched, score=HELD_OUT, metric=["loss", "exact"], every=2)
    assert same_state(state(plain), state(watched))
    assert [step for step, _ in result.state.history] == [1, 2, 3, 4, 5, 6]
    assert result.state.history == expected.state.history and result.loss == expected.loss
    assert result.state.series["learning rate"] == expected.state.series["learning rate"]
    curve = dict(result.state.metric_history["exact"])
    assert list(curve) == [2, 4, 6]
    after = score(watched, HELD_OUT, metric=["loss", "exact"], tokenizer=TOKENIZER, include_base=False, progress=False)
    assert result.state.metrics["exact"] == curve[6] == after.by("exact").scores["default"].value
    losses = dict(result.state.eval_history)
    assert list(losses) == [2, 4, 6]
    assert_close(losses[6], after.scores["default"].value)


@pytest.mark.parametrize("metric", ["exact", "loss", "choice"])
def test_rows_to_score_that_are_also_trained_on_are_counted(metric: str) -> None:
    rows = [row | {"choices": ["ab", "b"], "answer": "ab"} for row in ROWS]
    other = [{**rows[0], "prompt": f"new {number}>"} for number in range(2)]
    settings = {"metric": metric, "every": 2, "max_steps": 2}
    told = [trained(score=scored, **settings).message for scored in ([*rows[:2], *other], rows[2:3], other)]
    assert "rows to score: 2 of 4 rows are also trained on" in told[0]
    assert "rows to score: 1 of 1 row is also trained on" in told[1]
    assert "also trained on" not in told[2]


def test_rows_to_evaluate_that_are_also_trained_on_are_counted() -> None:
    told = trained(eval_data=[*ROWS[:3], {"prompt": "new>", "completion": "ab"}], max_steps=1).message
    assert "3 of the 4 evaluation rows are also trained on (3 of 12 rows are repeats)" in told


def test_patience_goes_by_the_score_and_keeps_the_best_state() -> None:
    seen = iter([0.0, 0.2, 0.9, 0.5, 0.5, 0.5, 0.5])  # first it is tried on the reference
    values: dict[int, float] = {}

    def own(answer: str, row: Any) -> float:
        if row is HELD_OUT[0]:
            values[len(values)] = next(seen)
        return values[len(values) - 1] if values else 0.2

    watched = model()
    rows = HELD_OUT[:1]
    result = trained(watched, score=rows, metric=own, every=1, patience=2)
    assert [value for _, value in result.state.metric_history["own"]] == [0.2, 0.9, 0.5, 0.5]
    assert result.steps == 4
    assert "the best weights, of step 2, were restored" in result.message
    assert result.state.best_step == 2


def test_a_smaller_loss_is_better_and_a_greater_share() -> None:
    for name, best in (("loss", False), ("exact", True)):
        seen: list[Any] = []
        trained(score=HELD_OUT, metric=name, every=3, patience=5, callbacks=[Seeing(seen)])
        assert (seen[0].metric_for_best_model, seen[0].greater_is_better) == (name, best)
        assert seen[0].eval_strategy == "no"


def test_a_score_that_is_named_by_hand_is_the_better_the_smaller_it_is_if_it_is_so() -> None:
    for given, greater in (({}, False), ({"greater_is_better": True}, True)):
        seen: list[Any] = []
        options = {"metric": ["exact", "perplexity"], "metric_for_best_model": "perplexity", "every": 3}
        trained(score=HELD_OUT, patience=5, callbacks=[Seeing(seen)], **options, **given)
        assert (seen[0].metric_for_best_model, seen[0].greater_is_better) == ("perplexity", greater)


class Seeing:
    """Notes the arguments with which a Trainer begins."""

    def __new__(cls, seen: list[Any]) -> Any:
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                seen.append(args)

        return Callback()


def test_evaluations_that_are_due_at_the_same_step_are_made() -> None:
    result = trained(eval_data=ROWS[:2], score=HELD_OUT, every=2, eval_strategy="steps", eval_steps=2)
    assert [step for step, _ in result.state.eval_history] == [2, 4, 6]
    assert [step for step, _ in result.state.metric_history["exact"]] == [2, 4, 6]


def test_a_metric_that_fails_ends_the_scores_and_not_the_run() -> None:
    def own(answer: str, row: Any) -> float:
        if answer == row["completion"]:  # as it is when it is tried before the training
            return 1.0
        raise KeyError("target")

    result = trained(score=HELD_OUT, metric=own, every=1)
    assert result.steps == 6
    assert "no scores: TrainingError: metric 'own' fails at row" in result.message


def test_a_metric_that_fails_on_every_answer_is_found_before_the_training(tmp_path: Path) -> None:
    def own(answer: str, row: Any) -> float:
        calls.append(answer)
        return float(row["target"])

    def long_enough(answer: str, row: Any) -> float:
        if len(answer) < 20:  # as JSON that is cut cannot be read
            raise ValueError("too short")
        return 1.0

    prompts = [{"prompt": row["prompt"]} for row in ROWS * 2]
    for rows, given in ((prompts, own), (prompts, ["json_valid", own]), (HELD_OUT, ["exact", own])):
        calls: list[str] = []
        target = model()
        before = state(target)
        with pytest.raises(TrainingError, match=r"'own' fails at row \d+: KeyError: 'target'.*; it fails on") as e:
            trained(target, score=rows, metric=given, output_dir=str(tmp_path / "out"))
        assert "\n" not in str(e.value)
        assert same_state(before, state(target)) and not list(tmp_path.iterdir())
        assert len(calls) == (3 if rows is HELD_OUT else 16)
    plain, tried = model(), model()
    trained(plain)
    trained(tried, score=prompts, metric=long_enough, every=6)
    assert same_state(state(plain), state(tried))


def test_an_interruption_of_the_scores_is_one_of_the_training() -> None:
    def own(answer: str, row: Any) -> float:
        calls.append(1)
        if len(calls) > 1 + len(HELD_OUT):  # the first call is on a reference
            raise KeyboardInterrupt
        return 0.5

    calls: list[int] = []
    with pytest.raises(TrainingInterrupted) as caught:
        trained(score=HELD_OUT, metric=own, every=2)
    result = caught.value.result
    assert (result.status, result.steps) == ("stopped", 4)
    assert dict(result.state.metric_history["own"]) == {2: 0.5}


def test_a_stop_during_the_scores_ends_the_training_without_them() -> None:
    control, calls = RunControl(), []

    def own(answer: str, row: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            control.request_stop("enough")
        return 0.5

    rows = ROWS * 5  # two batches
    result = trained(score=rows, metric=own, every=2, control=control)
    assert (result.status, result.steps) == ("stopped", 2)
    assert result.state.metric_history == {}
    assert "no scores" not in result.message


def test_a_training_in_the_background_is_scored() -> None:
    session, target = Session(), model()
    session.register(target, name="model")
    options = {"score": HELD_OUT, "metric": "exact", "every": 2, "keep": False}
    session.train(target, ROWS, **SETTINGS | options, max_steps=4, background=True)
    result = session.result(wait=True)
    assert [step for step, _ in result.state.metric_history["exact"]] == [2, 4]


def test_rows_on_which_a_metric_fails_are_left_out_and_named() -> None:
    def own(answer: str, row: Any) -> float:
        return 1 / (int(row["prompt"][0]) - 1)

    result = trained(score=HELD_OUT, metric=own, every=3)
    assert [value for _, value in result.state.metric_history["own"]] == [0.0, 0.0]  # of -1 and 1
    assert "scores at step 3: metric 'own' fails at row 1" in result.message
    assert "scores at step 6" not in result.message


@pytest.mark.filterwarnings("ignore:.*finite", "ignore:.*NaN", "ignore:.*nan", "ignore:.*exploded")
def test_outputs_that_are_not_numbers_are_named_once() -> None:
    target = model()
    with torch.no_grad():
        next(iter(target.manager.parameters("default"))).fill_(float("nan"))
    result = trained(target, score=HELD_OUT, metric="loss", every=3, max_steps=3, stop_on_divergence=False)
    assert "scores at step 3: default: its outputs are not numbers (NaN) at rows 0, 1, 2" in result.message


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "exact"}, ConfigError, "without score=…"),
        ({"max_score_rows": 3}, ConfigError, "max_score_rows has no effect without score=…"),
        ({"score": HELD_OUT, "max_score_rows": 0}, ConfigError, "max_score_rows must be a whole number of at least 1"),
        ({"max_new_tokens": 3}, ConfigError, "max_new_tokens has no effect without score=…"),
        ({"score": HELD_OUT, "max_new_tokens": 0}, ConfigError, "max_new_tokens"),
        ({"score": HELD_OUT, "metric": "loss", "max_new_tokens": 3}, ConfigError, "nothing is generated here"),
        ({"every": 2}, ConfigError, "without sample=… or score=…"),
        ({"score": HELD_OUT, "every": 0}, ConfigError, "every must be a number of steps"),
        ({"score": HELD_OUT, "metric": "exakt"}, ConfigError, "Did you mean 'exact'"),
        ({"score": ["text only"]}, TrainingError, "it has no reference"),
        (
            {"score": HELD_OUT, "metric": "loss", "eval_data": 2},
            ConfigError,
            "evaluation rows already give the loss",
        ),
        ({"score": HELD_OUT, "metric": "exakt", "processes": 2}, ConfigError, "Did you mean 'exact'"),
        ({"score": HELD_OUT, "metric": "exakt", "learning_rate": sweep(1e-3, 1e-2)}, ConfigError, "Did you mean"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_training(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    target = model()
    before = state(target)
    with pytest.raises(error, match=message):
        trained(target, **options)
    assert same_state(before, state(target))


def test_many_rows_are_sampled_if_answers_are_generated() -> None:
    rows = [{"prompt": f"{number}>", "completion": "ab"} for number in range(5 * MOST_ANSWERS)]
    target = model()

    def numbers(metric: Any, max_rows: int | None = None) -> list[int]:
        scorer = RowScorer(target, rows, metric, tokenizer=TOKENIZER, max_rows=max_rows)
        note = f"{len(scorer._read.rows):,} of 1,000 are scored, sampled at random (max_score_rows)"
        assert scorer.notes == ((note,) if len(scorer._read.rows) < len(rows) else ())
        return [row.number for row in scorer._read.rows]

    chosen = numbers(["loss", "exact"])
    assert len(set(chosen)) == MOST_ANSWERS and chosen == sorted(chosen) == numbers("f1")
    assert max(chosen) > 4 * MOST_ANSWERS, "not the first rows, which may be of one kind"
    assert len(numbers("loss")) == len(numbers("exact", 5 * MOST_ANSWERS)) == len(rows)
    assert len(numbers("loss", 3)) == len(numbers("exact", 3)) == 3


def test_the_number_of_scored_rows_is_an_option_that_a_run_keeps() -> None:
    asked: list[int] = []

    def own(answer: str, row: Any) -> float:
        asked.append(int(row["prompt"].rstrip(">")))
        return 1.0

    result = trained(score=ROWS, metric=own, max_score_rows=2, every=3)
    assert len(asked) == 1 + 4 and len(set(asked)) == 2  # the first call is on a reference
    assert "rows to score: 2 of 8 are scored, sampled at random (max_score_rows)" in result.message
    request = TrainRequest.of(model(), ROWS, score=ROWS, max_score_rows=2)
    assert to_take_over(to_keep(request.kept())[0])[0]["max_score_rows"] == 2


def test_the_length_of_scored_answers_is_an_option() -> None:
    lengths: list[int] = []

    def own(answer: str, row: Any) -> float:
        lengths.append(len(answer))
        return 1.0

    trained(score=ROWS, metric=own, max_new_tokens=1, every=3)
    assert set(lengths[1:]) <= {0, 1}, "a character is a token"


@pytest.mark.parametrize("last", [4, 5])
def test_a_run_keeps_its_scores_and_needs_the_rows_again(last: int, tmp_path: Path) -> None:
    """If it is stopped before scores that are due, they come first when it is resumed."""
    whole = trained(score=HELD_OUT, metric="perplexity", every=2, max_steps=8)
    session = Session()
    session.context.chosen_runs_folder = str(tmp_path)
    target = model()
    session.register(target, name="model")
    given = {"score": HELD_OUT, "metric": ["exact", "perplexity"], "every": 2}
    runs: list[Any] = []
    session.on_run(lambda run, name: runs.append(run))

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == last - 1:
                runs[0].control.request_stop("enough")

    stopped = session.train(target, ROWS, **SETTINGS | given, max_steps=8, callbacks=[Stop()])
    (record,) = RunStore(tmp_path).records()
    assert not record.is_complete
    assert stopped.steps == last and [step for step, _ in stopped.state.metric_history["exact"]] == [2, 4][: last - 3]
    rest = {"data": ROWS, "tokenizer": TOKENIZER, "model": target, "callbacks": []}
    with pytest.raises(TrainingError, match="score"):
        session.resume(**rest)
    result = session.resume(**rest, score=HELD_OUT).training
    assert [step for step, _ in result.state.metric_history["exact"]] == [2, 4, 6, 8]
    assert result.state.metric_history["perplexity"] == whole.state.metric_history["perplexity"]
    value = result.state.metrics["exact"]
    assert f"exact {metric(value)}" in str(session.runs())
    other = session.train(target, ROWS, **SETTINGS, max_steps=2)
    compared: Any = session.runs(Path(result.state.folder).name, Path(other.state.folder).name)
    assert compared.curves["exact"] == (((), result.state.metric_history["exact"]), ((), ()))
    assert re.search(rf"exact at best step +{re.escape(metric(value))} +–", str(compared))
    assert ">exact<" in to_html(compared.view())
    assert session.runs().to_dataframe().set_index("name")["exact"][record.name] == value


def test_evaluations_between_the_scores_do_not_decide_about_the_best_state() -> None:
    evaluations = {"eval_data": HELD_OUT, "eval_strategy": "steps", "eval_steps": 2}
    result = trained(score=HELD_OUT, metric="perplexity", every=3, patience=9, **evaluations)
    assert [step for step, _ in result.state.eval_history] == [2, 4, 6]
    assert [step for step, _ in result.state.metric_history["perplexity"]] == [3, 6]
    run = Run(model(), 6)
    arguments: Any = SimpleNamespace(metric_for_best_model="perplexity", greater_is_better=False)
    for step, metrics in ((3, {"eval_perplexity": 9.0}), (4, {"eval_loss": 2.0}), (6, {"eval_perplexity": 10.0})):
        run.record(step, loss=2.0)
        RunCallback(run).on_evaluate(arguments, TrainerState(global_step=step), TrainerControl(), metrics)
    run.publish(force=True)
    assert run.state.best_step == 3


def test_patience_by_a_metric_that_is_not_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"metric_for_best_model='exakt' is not measured: .* Did you mean 'exact'"):
        trained(score=HELD_OUT, metric="exact", patience=2, metric_for_best_model="exakt")
