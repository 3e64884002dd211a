"""Adapters that learn side by side: each as if it trained alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim import SGD
from transformers import Trainer, TrainerCallback, get_cosine_schedule_with_warmup

from nbpeft import IA3Config, get_peft_model, sweep, train
from nbpeft.engine.changes.random_numbers import drawing_from
from nbpeft.errors import AdapterExistsError, ConfigError, TrainingError, TrainingInterrupted
from nbpeft.losses import lazy_logits
from nbpeft.training import RunControl, SweepResult
from nbpeft.training.loop.train import run_training
from nbpeft.training.request import TrainRequest
from tests.closeness import assert_close
from tests.tiny_models import classifier, gpt2, llama
from tests.training.support import token_rows, trainable

RATES = {"a-lr1e-2": 0.01, "a-lr5e-2": 0.05}
FAST: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 3, "weight_decay": 0.1, "max_grad_norm": 0.05}


def swept_and_alone(make: Any, rows: Any, **arguments: Any) -> float:
    """The largest difference between the weights of a sweep over the learning rate and of trainings alone."""
    together = make()
    train(together, rows, learning_rate=sweep(*RATES.values()), **arguments)
    distance = 0.0
    for name, rate in RATES.items():
        alone = make()
        train(alone, rows, learning_rate=rate, **arguments)
        distance = max(distance, difference(together, name, alone, "a"))
    return distance


def difference(first: Any, name: str, second: Any, other: str) -> float:
    pairs = zip(first.manager.parameters(name), second.manager.parameters(other), strict=True)
    return max(float((one - two).detach().abs().max()) for one, two in pairs)


def ia3() -> Any:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    return get_peft_model(llama(), config, "a").train()


def convolutional() -> Any:
    base = gpt2(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, eos_token_id=0)
    return trainable(base, "a", target_modules=["c_attn"])


@pytest.mark.drawn(4)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_dropout": 0.3},
        {"use_dora": True, "lora_dropout": 0.3},
        {"lora_bias": True, "use_rslora": True},
        {"target_modules": ["embed_tokens", "up_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["lora", "dropout", "dora", "bias", "copies", "head"],
)
@pytest.mark.parametrize("tokens", [1, 10_000], ids=["apart", "in one pass"])
def test_each_learns_what_it_would_alone(config: dict[str, Any], tokens: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("nbpeft.sweeps.TOKENS_TOGETHER", tokens)
    assert swept_and_alone(lambda: trainable(name="a", **config), token_rows(12), **FAST) < 1e-5


@pytest.mark.parametrize(
    "config",
    [{}, {"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["frozen", "adapted", "copied"],
)
def test_the_usual_trainer_serves_all_in_one_pass_with_losses_in_chunks(config: Any, monkeypatch: Any) -> None:
    rows: list[int] = []
    original = lazy_logits.chunked_cross_entropy

    def counted(head: Any, hidden: Any, *args: Any, **options: Any) -> Any:
        rows.append(len(hidden))
        return original(head, hidden, *args, **options)

    monkeypatch.setattr(lazy_logits, "chunked_cross_entropy", counted)
    passes: list[int] = []
    model = trainable(name="a", **config)
    model.get_base_model().register_forward_hook(lambda *_: passes.append(1))
    train(model, token_rows(12), learning_rate=sweep(0.01, 0.05), max_steps=1, per_device_train_batch_size=3)
    assert len(passes) == 1
    assert len(rows) == 2
    assert rows[0] == rows[1]


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"label_smoothing_factor": 0.1},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"optim": "adafactor"},
    ],
    ids=["accumulated", "checkpointed", "smoothed", "cosine", "adafactor"],
)
def test_arguments_of_all_act_on_each(arguments: dict[str, Any]) -> None:
    make = lambda: trainable(name="a", lora_dropout=0.2)  # noqa: E731
    assert swept_and_alone(make, token_rows(12), **FAST | arguments) < 1e-5


@pytest.mark.drawn(2)
@pytest.mark.parametrize("tokens", [1, 10_000], ids=["apart", "in one pass"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_are_computed_again_for_their_rows_in_threads_of_autograd(
    reentrant: bool, tokens: int, monkeypatch: Any
) -> None:
    """On accelerators autograd has threads of its own, in which checkpointed layers run again."""
    original = Accelerator.backward

    def elsewhere(self: Any, loss: Any, **options: Any) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(original, self, loss, **options).result()

    monkeypatch.setattr(Accelerator, "backward", elsewhere)
    monkeypatch.setattr("nbpeft.sweeps.TOKENS_TOGETHER", tokens)
    checkpointed = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        "max_steps": 2,
    }
    assert swept_and_alone(lambda: trainable(name="a"), token_rows(12), **FAST | checkpointed) < 1e-5


def test_other_methods_and_models_learn_side_by_side() -> None:
    assert swept_and_alone(ia3, token_rows(12), **FAST) < 1e-5
    labelled = [{**row, "label": place % 3} for place, row in enumerate(token_rows(12))]
    assert swept_and_alone(lambda: trainable(classifier(), "a", task_type="SEQ_CLS"), labelled, **FAST) < 1e-5
    assert swept_and_alone(convolutional, token_rows(12), **FAST) < 1e-5


def test_a_trainer_with_a_loss_of_its_own_gets_a_pass_for_each() -> None:
    class Doubled(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    make = lambda: trainable(name="a")  # noqa: E731
    assert swept_and_alone(make, token_rows(12), trainer_class=Doubled, **FAST) < 1e-5


def test_each_has_fields_of_its_own() -> None:
    """Decay, clipping, schedule and betas, one of which would show in the other's weights."""
    own: dict[str, dict[str, Any]] = {
        "a": {"learning_rate": 0.02, "weight_decay": 0.5, "max_grad_norm": 0.01, "lr_scheduler_type": "constant"},
        "b": {"learning_rate": 0.05, "warmup_steps": 3, "max_grad_norm": 0.0, "adam_beta1": 0.5},
    }
    model = trainable(name="a")
    model.manager.copy("a", "b")
    result = train(model, token_rows(12), members=own, max_steps=4)
    assert [member.name for member in result.state.members] == ["a", "b"]
    for name, fields in own.items():
        alone = trainable(name="a")
        train(alone, token_rows(12), max_steps=4, **fields)
        assert difference(model, name, alone, "a") < 1e-5


def test_a_swept_field_of_the_config_makes_new_adapters() -> None:
    model = trainable(name="a")
    result = train(model, token_rows(12), r=sweep(2, 8), seed=5, **FAST)
    assert {name: model.peft_config[name].r for name in ("a", "a-r2", "a-r8")} == {"a": 4, "a-r2": 2, "a-r8": 8}
    assert result.state.members[0].settings == {"r": "2"}
    for rank in (2, 8):
        alone = trainable(name="other")
        with torch.random.fork_rng():
            torch.manual_seed(5)
            alone.add_adapter("a", model.peft_config["a"].copy(r=rank))
        train(alone, token_rows(12), adapter="a", seed=5, **FAST)
        assert difference(model, f"a-r{rank}", alone, "a") < 1e-5


def test_the_result_ranks_them_and_the_best_is_active() -> None:
    model = trainable(name="a")
    result = train(model, token_rows(12), token_rows(4, seed=1), learning_rate=sweep(1e-6, 0.05), **FAST)
    assert isinstance(result, SweepResult)
    slow, fast = result.members
    assert (slow.status, fast.status, slow.step, fast.step) == ("finished", "finished", 4, 4)
    assert slow.eval_loss is not None
    assert fast.eval_loss is not None
    assert result.best == (slow if slow.eval_loss < fast.eval_loss else fast).name
    assert model.active_adapters == [result.best]
    assert result.eval_loss == min(slow.eval_loss, fast.eval_loss)
    assert len(slow.history) == 4
    assert result.best in str(result)
    assert "best" in str(result)
    alone = trainable(name="a")
    once = train(alone, token_rows(12), token_rows(4, seed=1), learning_rate=0.05, **FAST)
    assert_close(fast.eval_loss, once.eval_loss)
    assert_close(fast.loss, once.loss)
    assert_close(fast.gradient_norm, once.state.gradient_norm)


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def test_one_can_be_stopped_while_the_others_go_on() -> None:
    model, control = trainable(name="a"), RunControl()
    stop = At(1, lambda: control.request_stop_of("a-lr1e-2"))
    rates = sweep(*RATES.values())
    result = train(model, token_rows(12), learning_rate=rates, control=control, callbacks=[stop], **FAST)
    stopped, finished = result.state.members
    assert (stopped.status, stopped.step, finished.status, finished.step) == ("stopped", 2, "finished", 4)
    alone = trainable(name="a")
    train(alone, token_rows(12), learning_rate=0.05, **FAST)
    assert difference(model, "a-lr5e-2", alone, "a") < 1e-5


def test_when_all_are_stopped_the_training_ends() -> None:
    model, control = trainable(name="a"), RunControl()
    stop = At(1, lambda: [control.request_stop_of(name) for name in RATES])
    result = train(
        model, token_rows(12), learning_rate=sweep(*RATES.values()), control=control, callbacks=[stop], **FAST
    )
    assert result.steps == 2
    assert "all adapters have stopped" in result.message


@pytest.mark.filterwarnings("ignore:.*exploded", "ignore:.*finite", "ignore:.*NaN", "ignore:.*nan")
def test_one_that_diverges_leaves_the_others_alone() -> None:
    model = trainable(name="a")
    result = train(model, token_rows(12), learning_rate=sweep(1e30, 0.05), **FAST)
    lost, good = result.state.members
    assert (lost.status, good.status) == ("diverged", "finished")
    assert model.active_adapters == [good.name]
    assert f"{lost.name} diverged at step" in result.message
    alone = trainable(name="a")
    train(alone, token_rows(12), learning_rate=0.05, **FAST)
    assert difference(model, good.name, alone, "a") < 1e-5


def fail(error: type[BaseException]) -> Any:
    def act() -> None:
        raise error("somebody's mistake")

    return act


def test_a_failure_before_the_first_step_leaves_the_model_as_it_was() -> None:
    model = trainable(name="a")
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    flags = {name: part.requires_grad for name, part in model.named_parameters()}
    with pytest.raises(ValueError, match="mistake"):
        train(model, token_rows(12), learning_rate=sweep(0.1, 0.2), callbacks=[At(0, fail(ValueError))], **FAST)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: part.requires_grad for name, part in model.named_parameters()} == flags
    assert model.active_adapters == ["a"]
    assert not hasattr(model.get_base_model(), "_loss_function")


def test_an_interruption_keeps_what_all_have_learned() -> None:
    model = trainable(name="a")
    with pytest.raises(TrainingInterrupted) as caught:
        train(
            model,
            token_rows(12),
            learning_rate=sweep(*RATES.values()),
            callbacks=[At(2, fail(KeyboardInterrupt))],
            **FAST,
        )
    result = caught.value.result
    assert isinstance(result, SweepResult)
    assert [(member.status, member.step) for member in result.members] == [("stopped", 2), ("stopped", 2)]
    assert model.active_adapters == [result.best]


def test_a_sweep_makes_its_adapters_anew_and_refuses_ones_that_exist() -> None:
    model = trainable(name="a")
    result = train(model, token_rows(12), learning_rate=sweep(*RATES.values()), **FAST)
    assert "each adapter starts as a copy of 'a'" in str(result)
    before = [part.detach().clone() for part in model.manager.parameters("a-lr1e-2")]
    with pytest.raises(AdapterExistsError, match="'a-lr1e-2' exists already, and a sweep makes its adapters anew"):
        train(model, token_rows(12), adapter="a", learning_rate=sweep(*RATES.values()), **FAST)
    assert all(torch.equal(*pair) for pair in zip(before, model.manager.parameters("a-lr1e-2"), strict=True))
    assert model.manager.names == ("a", *RATES) and model.active_adapters == [result.best]


def test_initial_weights_are_those_of_the_random_numbers_given() -> None:
    model, alone = trainable(name="a"), trainable(name="a")
    train(model, token_rows(12), **FAST)
    trained = [part.detach().clone() for part in model.manager.parameters("a")]
    request = TrainRequest.of(model, token_rows(12), learning_rate=sweep(*RATES.values()), **FAST)
    result = run_training(replace(request, first_random=3))
    assert "starts from new weights: the initial ones of 'a' are unknown" in result.message
    assert all(torch.equal(*pair) for pair in zip(trained, model.manager.parameters("a"), strict=True))
    with drawing_from(3):
        alone.manager.add("b", alone.peft_config["a"], trainable=True)
    train(alone, token_rows(12), adapter="b", learning_rate=0.01, **FAST)
    assert difference(model, "a-lr1e-2", alone, "b") < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": sweep(0.1, 0.2), "lr": sweep(1, 2)}, "'lr' is not a field of TrainingArguments"),
        ({"num_train_epochs": sweep(1, 2)}, "num_train_epochs cannot be a sweep"),
        ({"learning_rate": sweep(0.1, 0.2), "members": {"a": {}, "b": {}}}, "learning_rate is a sweep, but the adap"),
        ({"members": {"a": {}}}, "members must map at least two adapters"),
        ({"members": {"a": {}, "b": {}}, "adapter": "a"}, "adapter cannot be combined with members"),
        ({"learning_rate": sweep(0.1, 0.2), "fp16": True}, "fp16 cannot be combined with several adapters"),
        ({"learning_rate": sweep(0.1, "fast")}, "learning_rate must be a number, not 'fast'"),
        ({"r": sweep(4, -1)}, "r must be a positive whole number"),
    ],
)
def test_what_cannot_be_swept_is_refused(arguments: dict[str, Any], words: str) -> None:
    model = trainable(name="a")
    with pytest.raises(ConfigError, match=words):
        train(model, token_rows(4), **arguments)
    assert model.manager.names == ("a",)
    assert model.active_adapters == ["a"]


def test_a_sweep_starts_from_one_adapter_and_trains_nothing_else() -> None:
    model = trainable(name="a")
    model.manager.copy("a", "b")
    model.manager.activate(["a", "b"])
    with pytest.raises(TrainingError, match="starts from one adapter"):
        train(model, token_rows(4), learning_rate=sweep(0.1, 0.2))
    model.manager.activate("a")
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"lm_head\.weight is trainable"):
        train(model, token_rows(4), learning_rate=sweep(0.1, 0.2))
    assert model.manager.names == ("a", "b")


def cloned(model: Any, source: str, name: str | None, fields: dict[str, Any], **arguments: Any) -> Any:
    """The result of a sweep over the rates of which one adapter is cloned after the second step."""
    control = RunControl()
    act = At(1, lambda: control.request_clone_of(source, name, **fields))
    given = FAST | {"learning_rate": sweep(*RATES.values())} | arguments
    return train(model, token_rows(12), control=control, callbacks=[act], **given)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("tokens", [1, 10_000], ids=["apart", "in one pass"])
def test_a_clone_goes_on_from_weights_and_optimizer_state(tokens: int, monkeypatch: Any) -> None:
    """As if its adapter had trained alone and gone on with the clone's settings from that step."""
    monkeypatch.setattr("nbpeft.sweeps.TOKENS_TOGETHER", tokens)
    model = trainable(name="a", lora_dropout=0.3)
    fields = {"learning_rate": 0.02, "weight_decay": 0.5, "lr_scheduler_type": "cosine"}
    result = cloned(model, "a-lr5e-2", "b", fields, max_steps=6)
    _, source, clone = result.members
    assert (clone.name, clone.status, clone.step) == ("b", "finished", 6)
    assert [step for step, _ in clone.history] == [3, 4, 5, 6]
    assert clone.settings == {"learning_rate": "0.02", "weight_decay": "0.5", "lr_scheduler_type": "cosine"}
    assert source.settings == {"learning_rate": "0.05", "weight_decay": "0.1", "lr_scheduler_type": "linear"}
    assert "b forked from a-lr5e-2 at step 2" in result.message
    assert set(model.manager.names) == {"a", *RATES, "b"} and model.active_adapters == [result.best]

    def change(optimizer: Any, schedule: Any) -> None:
        for group in optimizer.param_groups:
            group["initial_lr"], group["weight_decay"] = 0.02, 0.5 if group["weight_decay"] else 0.0
        schedule.base_lrs = [0.02] * len(schedule.base_lrs)
        factor = get_cosine_schedule_with_warmup(SGD([torch.zeros(1)], 1.0), 0, 6).lr_lambdas[0]
        schedule.lr_lambdas = [factor] * len(schedule.lr_lambdas)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * factor(2)

    class Changed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                change(kwargs["optimizer"].optimizer, kwargs["lr_scheduler"])

    for name, callbacks in (("a-lr5e-2", []), ("b", [Changed()])):
        alone = trainable(name="a", lora_dropout=0.3)
        train(alone, token_rows(12), learning_rate=0.05, callbacks=callbacks, **FAST | {"max_steps": 6})
        assert difference(model, name, alone, "a") < 1e-5


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("source", "name", "fields", "words"),
    [
        ("c", "b", {}, "'c' is not being trained in this sweep; these are: a-lr1e-2, a-lr5e-2"),
        ("a-lr1e-2", "a", {}, "'a' already exists; delete it or choose another name"),
        ("a-lr1e-2", "b", {"num_train_epochs": 2}, "num_train_epochs cannot be a sweep"),
        ("a-lr1e-2", "b", {"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
        ("a-lr1e-2", "b", {"lr_scheduler_type": "cosin"}, "lr_scheduler_type 'cosin' is unknown"),
        ("a-lr1e-2", "b", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "depends on a single loss"),
        ("a-lr1e-2", "b.c", {}, "'b.c'"),
    ],
)
def test_what_cannot_be_cloned_is_said_and_training_goes_on(source: str, name: str, fields: Any, words: str) -> None:
    model = trainable(name="a")
    result = cloned(model, source, name, fields)
    assert f"{source} was not cloned: " in result.message and words in result.message
    assert set(model.manager.names) == {"a", *RATES} and result.steps == 4
    alone = trainable(name="a")
    train(alone, token_rows(12), learning_rate=0.05, **FAST)
    assert difference(model, "a-lr5e-2", alone, "a") < 1e-5


def test_a_clone_without_a_name_is_called_by_what_it_has_of_its_own() -> None:
    model = trainable(name="a")
    model.manager.copy("a", "a-lr5e-2-lr25e-3")
    result = cloned(model, "a-lr5e-2", None, {})
    assert result.members[-1].name == "a-lr5e-2-lr25e-3-2" and result.members[-1].settings["learning_rate"] == "0.025"


def test_a_clone_has_random_numbers_as_its_source_where_only_some_have_dropout() -> None:
    model, control = trainable(name="a"), RunControl()
    act = At(1, lambda: control.request_clone_of("a-dropout3e-1", "b", learning_rate=0.05))
    given = FAST | {"learning_rate": 0.05, "lora_dropout": sweep(0.0, 0.3), "max_steps": 9}
    result = train(model, token_rows(7), control=control, callbacks=[act], **given)
    assert [member.name for member in result.members] == ["a-dropout0", "a-dropout3e-1", "b"]
    assert difference(model, "b", model, "a-dropout3e-1") == 0
