"""A training that diverges ends with the last good weights, says so, and leaves nothing worse behind."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from nbpeft import AdaLoraConfig, get_peft_model, sweep
from nbpeft.display import palette
from nbpeft.display.html import to_html
from nbpeft.display.training import training_card
from nbpeft.engine.contract.trained import mark_saved
from nbpeft.runs.store import RunPlace, RunStore
from nbpeft.session import Session
from nbpeft.training import Run, Trainer, train
from nbpeft.training.monitor import run_checkpointer
from nbpeft.training.watching import divergence
from nbpeft.training.watching.divergence import DivergenceStop, Throttle
from tests.closeness import is_close
from tests.tiny_models import llama, same_state
from tests.training.support import Clock, token_rows, trainable, weights

SETTINGS: dict[str, Any] = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 0.01}
ROWS = token_rows()

pytestmark = pytest.mark.filterwarnings(
    *("ignore:Training stopped", "ignore:.*exploded", "ignore:.*NaN", "ignore:.*finite")
)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies before each step."""
    monkeypatch.setattr(divergence, "SHARE", math.inf)


class Breaks(Trainer):
    """The loss is no number from the sixth step on."""

    value, step = math.nan, 5

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.value if self.model.training and self.state.global_step >= self.step else loss


class Infinite(Breaks):
    value = math.inf


class AtOnce(Breaks):
    step = 0


class Kept(TrainerCallback):
    """The weights after each step."""

    def __init__(self, model: Any) -> None:
        self.model, self.weights = model, {0: weights(model)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = weights(self.model)


class Explodes(TrainerCallback):
    """Weights that no training leads to, after a step."""

    def __init__(self, model: Any, step: int) -> None:
        self.model, self.step = model, step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                for parameter in self.model.manager.parameters("default"):
                    parameter.add_(1e5)


def trained(**more: Any) -> tuple[Any, Kept, Any]:
    model = trainable()
    kept = Kept(model)
    callbacks = [kept, *more.pop("callbacks", [])]
    return model, kept, train(model, ROWS, callbacks=callbacks, **{"trainer_class": Breaks, **SETTINGS, **more})


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("kind", [Breaks, Infinite])  # which of the two it is may be a matter of roundings
def test_a_loss_that_is_not_finite_ends_it_with_the_last_good_weights(kind: Any, batches: int) -> None:
    model, kept, result = trained(trainer_class=kind, gradient_accumulation_steps=batches)
    reason = "stopped at step 6: the loss is NaN or infinite: try a lower learning rate, or check the labels"
    back = "the weights of step 4, the last good ones, were restored"
    assert (result.status, result.steps, result.kept_step) == ("stopped", 6, 4)
    assert result.message == f"{reason} · {back}" and result.state.errors == (reason, back)
    assert str(result).endswith(result.message)
    assert same_state(weights(model), kept.weights[4])
    assert model.manager.unsaved == {"default"}


def test_the_weights_that_were_there_come_back_where_no_step_was_good() -> None:
    model = trainable()
    mark_saved(model.manager, "default")
    before = weights(model)
    result = train(model, ROWS, trainer_class=AtOnce, **SETTINGS)
    assert (result.status, result.steps, result.kept_step) == ("stopped", 1, 0)
    assert "the initial weights, the last good ones, were restored" in result.message
    assert same_state(weights(model), before) and not model.manager.unsaved


@pytest.mark.parametrize("step", [3, 11])
def test_exploded_weights_end_it_also_after_the_last_step(step: int) -> None:
    model = trainable()
    kept = Kept(model)
    result = train(model, ROWS, callbacks=[Explodes(model, step), kept], **SETTINGS)
    last = step + 1
    assert (result.status, result.steps) == ("stopped", min(last + 1, 12))
    assert f"stopped at step {result.steps}: weights of default have exploded: the learning rate is too high" in str(
        result
    )
    assert result.kept_step == step and same_state(weights(model), kept.weights[step])


def test_it_can_be_switched_off() -> None:
    model, _, result = trained(stop_on_divergence=False)
    assert (result.status, result.steps, result.kept_step) == ("finished", 12, None)
    assert not all(bool(value.isfinite().all()) for value in weights(model).values())
    assert any("NaN" in warning for warning in result.state.errors)


def test_weights_that_have_exploded_before_are_trained_on() -> None:
    """The run warns of them; modules trained as a whole may have such weights from the start."""
    model = trainable()
    with torch.no_grad():
        next(iter(model.manager.parameters("default"))).add_(1e5)
    result = train(model, ROWS, **SETTINGS | {"max_steps": 2})
    assert (result.status, result.steps) == ("finished", 2) and "exploded before this run" in result.message


def test_the_best_weights_come_back_where_patience_keeps_them() -> None:
    model, kept, result = trained(eval_data=token_rows(4, 5), patience=3, eval_steps=3)
    assert (result.steps, result.kept_step, result.best_step) == (6, 3, 3)
    assert result.message.endswith("check the labels · the best weights, of step 3, were restored")
    assert same_state(weights(model), kept.weights[3])


def test_the_best_checkpoint_is_loaded_where_the_trainer_does(tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path), "load_best_model_at_end": True, "eval_steps": 3}
    model, kept, result = trained(eval_data=token_rows(4, 5), **settings)
    assert (result.steps, result.kept_step) == (6, 3) and same_state(weights(model), kept.weights[3])
    assert not (tmp_path / "checkpoint-6").exists()


def test_neither_a_checkpoint_nor_an_evaluation_of_what_diverged(tmp_path: Path) -> None:
    evaluated: list[int] = []

    class Notes(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            evaluated.append(state.global_step)

    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3, "eval_steps": 2}
    trained(eval_data=token_rows(4, 5), callbacks=[Notes()], **settings)
    assert evaluated == [2, 4] and sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3"]


def test_what_is_kept_of_the_run_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No state of later steps than the last good weights; with another loss it goes on from there."""
    monkeypatch.setattr(run_checkpointer, "SHORTEST", 0.0)
    monkeypatch.setattr(run_checkpointer, "SHARE", 1e9)
    trained(run_dir=tmp_path)
    (record,) = RunStore(tmp_path).records()
    assert (record.status, record.step, record.kept_steps) == ("stopped", 6, (4,))
    assert record.message.startswith("stopped at step 6: the loss is NaN")
    model, state = trainable(), str(Path(record.path, "checkpoint-4"))
    place = RunPlace(RunStore(tmp_path), record.name)
    result = train(model, ROWS, run_dir=place, resume_from_checkpoint=state, **SETTINGS)
    assert (result.status, result.steps) == ("finished", 12)
    assert same_state(weights(model), weights(trained(trainer_class=Trainer)[0]))


def test_ranks_that_went_since_are_there_again() -> None:
    config = AdaLoraConfig(
        **{"target_modules": ["q_proj"], "init_r": 4, "target_r": 1, "total_step": 12, "tinit": 1, "tfinal": 1}
    )
    torch.manual_seed(1)
    model = get_peft_model(llama(), config).train()
    patterns: dict[int, Any] = {}

    class Notes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            patterns[state.global_step] = dict(model.peft_config["default"].rank_pattern)

    train(model, ROWS, trainer_class=Breaks, callbacks=[Notes()], **SETTINGS)
    assert patterns[4] != patterns[6] and model.peft_config["default"].rank_pattern == patterns[4]


# What it costs


def test_copies_take_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "SHARE", 0.01)
    clock, done = Clock(), []
    throttle = Throttle(clock)

    def copy() -> None:
        clock.advance(0.02)
        done.append(clock.now)

    for _ in range(100):
        if throttle.due:
            throttle(copy)
        clock.advance(0.1)
    assert len(done) == 5 and 0.02 * len(done) <= 0.01 * clock.now + 0.02


def test_no_step_waits_for_a_device_but_where_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a batch is taken in as it is; a step that neither logs nor copies turns nothing into a number."""
    model, read = trainable(), []
    guard = DivergenceStop(Run(model, 3), model, clock=Clock())
    monkeypatch.setattr(divergence, "SHARE", 0.01)
    monkeypatch.setattr(divergence, "have_exploded", lambda parameters: bool(read.append("weights")))

    class Loss(Tensor):
        def __float__(self) -> float:
            read.append("loss")
            return 1.0

    for _ in range(4):
        guard.after_batch(torch.ones(()).as_subclass(Loss))
    assert read == [] and float(guard._losses) == 1.0 and guard._losses.item() == 4.0


# Sweeps, the background, several processes, and what is shown


@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_an_adapter_of_a_sweep_diverges_alone(clipping: float) -> None:
    """With its own last good weights; the others learn as if they were alone, also where no gradient is clipped."""
    settings = {**SETTINGS, "max_grad_norm": clipping, "lr_scheduler_type": "constant"}
    model = trainable(name="a")
    before = weights(model, "a")
    result = train(model, ROWS, **settings | {"learning_rate": sweep(1e38, 0.01)})
    lost, good = result.members
    assert (lost.status, good.status, result.status, result.best) == ("diverged", "finished", "finished", good.name)
    assert result.state.warnings == (
        f"{lost.name} diverged at step 2 and is no longer trained; the initial weights were restored",
    )
    assert all(torch.equal(*pair) for pair in zip(weights(model, lost.name).values(), before.values(), strict=True))
    alone = trainable(name="a")
    train(alone, ROWS, **settings)
    pairs = zip(model.manager.parameters(good.name), alone.manager.parameters("a"), strict=True)
    assert all(is_close(*pair) for pair in pairs)


def test_a_sweep_of_which_all_diverge_is_stopped() -> None:
    settings = {**SETTINGS, "learning_rate": sweep(1e38, 9e37), "lr_scheduler_type": "constant"}
    result = train(trainable(name="a"), ROWS, **settings)
    assert result.status == "stopped" and {member.status for member in result.members} == {"diverged"}
    assert "all adapters diverged" in result.message


def test_in_the_background_too() -> None:
    session = Session()
    session.context.chosen_runs_folder = "off"
    torch.manual_seed(0)
    model = session.add(llama(), {"r": 4}, name="a", variable="m").model
    session.train(model, ROWS, background=True, trainer_class=Breaks, **SETTINGS)
    session.context.background[session.context.models.get(model)].join()
    result = session.result(model)
    assert (result.status, result.steps, result.kept_step) == ("stopped", 6, 4)
    assert session.train(model, ROWS, **SETTINGS | {"max_steps": 1}).message.startswith(
        "continues from the weights after step 4"
    )
    session.close()


def test_the_card_says_in_red_why_it_ended_and_in_grey_what_is_no_problem() -> None:
    _, _, result = trained(eval_data=4)
    html = to_html(training_card(result.state))
    for words in ("stopped at step 6: the loss is NaN", "the weights of step 4, the last good ones, were restored"):
        assert f'<span style="color:{palette.ERROR_TEXT}">✖ {words}' in html
    assert f"color:{palette.ERROR_TEXT};font-weight:600" in html and ">stopped</span>" in html, "the status is red, too"
    assert re.search(f'<span style="color:{re.escape(palette.DIM)}">4 of 32 rows held out', html)
    running = to_html(training_card(Run(trainable(), 3).state))
    assert "held out" not in running
