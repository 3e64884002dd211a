from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import transformers

import nbpeft
from nbpeft.model import LoraConfig, get_peft_model
from nbpeft.state import TrainState
from nbpeft.training import start_run, train
from nbpeft.training.adapters.learning_check import frozen_head, why_no_gradient
from nbpeft.training.loop.train import _error_to_raise
from tests.tiny_models import llama
from tests.training.support import token_rows, trainable

TOKENS = torch.tensor([row["input_ids"][:4] for row in token_rows(8)])


def loop(model, steps=3, rate=1e-2, labels=TOKENS, parameters=None, before_step=lambda: None, total=None):
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(chosen if parameters is None else parameters, lr=rate)
    model.train()
    with start_run(model, total_steps=total) as run:
        for _ in range(steps):
            before_step()
            loss = model(input_ids=TOKENS, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss)
    return run.state


def test_a_healthy_run_says_nothing_and_leaves_no_hooks():
    model = trainable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = loop(model, steps=12)
    assert state.message == "" and state.status == "finished"
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_step_reported_before_its_backward_is_no_false_alarm():
    model = trainable()
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], lr=1e-2)
    with warnings.catch_warnings(), start_run(model) as run:
        warnings.simplefilter("error")
        for _ in range(4):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            run.step(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert run.state.message == ""


def test_everything_frozen():
    model = trainable()
    model.manager.freeze("default")
    with pytest.warns(UserWarning, match="Nothing is trainable: adapter 'default' is frozen"), start_run(model):
        pass


def test_some_modules_without_gradient_are_named():
    model = trainable(llama(), target_modules=["q_proj", "lm_head"])
    layers = model.get_base_model().model.layers

    def cut():
        layers[0].self_attn.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)

    with pytest.warns(UserWarning, match="1 of 3 trained modules were not reached") as caught:
        state = loop(model, before_step=cut)
    assert [str(warning.message) for warning in caught] == [state.message]
    assert "(model.layers.0.self_attn.q_proj)" in state.message


def test_reentrant_checkpointing_with_a_trained_head_is_noticed():
    model = trainable(llama(), target_modules=["q_proj", "lm_head"])
    base = model.get_base_model()
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads()
    assert "enable_input_require_grads" in why_no_gradient(model)
    with pytest.warns(UserWarning) as caught:
        state = loop(model)
    assert "2 of 3 trained modules were not reached" in state.message
    assert "call model.enable_input_require_grads()" in state.message
    assert state.message in {str(warning.message) for warning in caught}
    base.enable_input_require_grads()
    assert why_no_gradient(model) == ""
    assert loop(model).message == ""


def test_reentrant_checkpointing_alone_fails_with_the_remedy_in_the_state():
    model = trainable()
    base = model.get_base_model()
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads()
    states: list[TrainState] = []
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(RuntimeError, match="does not require grad"),
        start_run(model, publish=states.append),
    ):
        model.train()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert states[-1].status == "failed"
    assert "enable_input_require_grads" in states[-1].message


def test_non_reentrant_checkpointing_is_fine():
    model = trainable()
    model.get_base_model().activation_checkpointing_enable()
    model.get_base_model().disable_input_require_grads()
    assert why_no_gradient(model) == "" and loop(model).message == ""


def test_labels_without_anything_to_learn():
    labels = torch.full_like(TOKENS, -100)
    with pytest.warns(UserWarning) as caught:
        state = loop(trainable(), labels=labels)
    messages = [str(warning.message) for warning in caught]
    assert any("is there a label that is not -100" in message for message in messages)
    assert len(messages) == 2 and state.message == " · ".join(messages) and "NaN since step 1" in state.message


def scaled_loop(scale, steps):
    model = trainable().train()
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], lr=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with start_run(model) as run:
        for _ in range(steps):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss * 10
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.step(loss)
    return run.state, scaler.get_scale()


def test_a_scaler_that_skips_its_first_steps_is_no_false_alarm():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state, scale = scaled_loop(2.0**127, steps=12)
    assert state.message == "" and scale < 2.0**126


def test_a_scaler_that_skips_every_step_is_told():
    with pytest.warns(UserWarning, match="The first gradients of adapter 'default' are not finite"):
        state, _ = scaled_loop(float("inf"), steps=12)
    assert "bf16" in state.message


def test_a_head_in_float16_under_a_scaler_is_told_with_the_remedy():
    model = trainable(llama(dtype=torch.float16), modules_to_save=["lm_head"]).train()
    optimizer = torch.optim.SGD(model.manager.parameters("default"), lr=1e-5)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="unscale FP16") as caught, start_run(model) as run:
        scaler.scale(model(input_ids=TOKENS, labels=TOKENS).loss).backward()
        scaler.step(optimizer)
    assert "cast_mixed_precision_params(model, torch.float16)" in run.state.message
    assert "cast_mixed_precision_params" in str(_error_to_raise(caught.value, model, None))
    nbpeft.cast_mixed_precision_params(model, torch.float16)
    assert {parameter.dtype for parameter in model.manager.parameters("default")} == {torch.float32}


def test_zero_gradients():
    model = trainable()
    with (
        pytest.warns(UserWarning, match="All first gradients of adapter 'default' are zero"),
        start_run(model, total_steps=1) as run,
    ):
        (model(input_ids=TOKENS, labels=TOKENS).loss * 0).backward()
        run.step(1.0)


def test_an_optimizer_made_before_the_adapter():
    base = llama()
    parameters = list(base.parameters())
    model = trainable(base)
    for parameter in parameters:
        parameter.requires_grad_(False)
    with pytest.warns(UserWarning, match="No weight of adapter 'default' has changed in 10 steps") as caught:
        state = loop(model, steps=15, parameters=parameters)
    assert "created before the adapter" in state.message and len(caught) == 1


def test_a_short_run_is_judged_at_its_end():
    with pytest.warns(UserWarning, match="has changed in 2 steps: is the learning rate zero"):
        loop(trainable(), steps=2, rate=0.0)


def classifier(**config):
    settings = llama().config
    settings.num_labels, settings.pad_token_id = 3, 0
    settings.architectures = ["LlamaForCausalLM"]
    base = transformers.LlamaForSequenceClassification(settings)
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"], **config))


def test_a_new_head_that_stays_frozen_is_named():
    note = frozen_head(classifier())
    assert note.startswith("The head 'score' is newly initialized") and "modules_to_save=['score']" in note
    model = classifier()
    with pytest.warns(UserWarning, match="The head 'score'"), start_run(model):
        pass


def test_a_head_that_is_saved_or_was_loaded_is_fine(tmp_path):
    assert frozen_head(classifier(modules_to_save=["score"])) == ""
    assert frozen_head(classifier(task_type="SEQ_CLS")) == ""
    assert frozen_head(trainable()) == ""
    classifier().get_base_model().config.save_pretrained(tmp_path)
    model = classifier()
    model.get_base_model().config.architectures = ["LlamaForSequenceClassification"]
    assert frozen_head(model) == ""
    base = model.get_base_model()
    base.__class__ = type("OwnName", (type(base),), {})
    assert frozen_head(model) == ""


def test_a_head_loaded_from_another_class_is_found(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    loaded.config.pad_token_id = 0
    assert "'score'" in frozen_head(get_peft_model(loaded, LoraConfig(target_modules=["q_proj"])))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert frozen_head(trainable(again)) == ""


def test_a_run_that_is_never_ended_keeps_nothing_alive():
    model = trainable()
    run = start_run(model, 3)
    run.begin()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    parameters = model.manager.parameters("default")
    hooked = sum(bool(parameter._post_accumulate_grad_hooks) for parameter in parameters)
    held = [weakref.ref(each) for each in (model, model.get_base_model(), model.manager, parameters[0])]
    del run
    gc.collect()
    assert hooked == len(parameters)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters), "the hooks went with the run"
    del model, parameters
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def test_a_run_that_goes_on_does_not_keep_its_model():
    model = trainable()
    run = start_run(model, 3)
    run.begin()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    held = [weakref.ref(each) for each in (model, model.get_base_model(), model.manager)]
    del model
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)
    run.record(1, loss=1.0)
    run.finish("finished")
    assert run.state.message == "" and run.state.step == 1


def test_a_plain_model_is_watched_too():
    layer = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="No weight of the model has changed in 10 steps"), start_run(layer) as run:
        for _ in range(12):
            layer(torch.ones(1, 2)).sum().backward()
            run.step(1.0)


def test_a_run_resumed_after_its_end_does_no_step_and_does_not_warn(tmp_path):
    model = trainable()
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    settings["learning_rate"] = 1e-3
    train(model, token_rows(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = train(model, token_rows(), resume_from_checkpoint=True, **settings)
        more = train(model, token_rows(), resume_from_checkpoint=True, **(settings | {"max_steps": 3}))
    assert (again.status, again.steps, again.message) == (
        "finished",
        2,
        "no steps left: the run had already finished at step 2",
    )
    assert (more.steps, more.message) == (3, "")


class MayBeNaN(transformers.Trainer):
    """Whether a loss that overflows ends as NaN or as a large number is a matter of roundings: both, from step 2."""

    is_nan = False

    def compute_loss(self, *args, **kwargs):
        loss: Any = super().compute_loss(*args, **kwargs)
        return torch.full_like(loss, 1e30) + 0 * loss.nan_to_num() if not self.is_nan else loss * float("nan")


class IsNaN(MayBeNaN):
    is_nan = True


class IsNaNLater(IsNaN):
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step:
            return super().compute_loss(*args, **kwargs)
        return transformers.Trainer.compute_loss(self, *args, **kwargs)


class IsLargeLater(IsNaNLater):
    is_nan = False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("classes"), [(IsNaNLater, IsNaN), (IsLargeLater, MayBeNaN)], ids=["nan", "large"])
def test_exploded_weights_are_the_message_whatever_became_of_the_loss(classes):
    model = trainable()
    first, second = (
        train(model, token_rows(), trainer_class=each, max_steps=3, learning_rate=rate, stop_on_divergence=False)
        for each, rate in zip(classes, (1e9, 1e-3), strict=True)
    )
    assert first.message == "Weights of adapter 'default' have exploded in 3 steps: the learning rate is too high."
    assert second.message.startswith("Weights of adapter 'default' had exploded before this run")
    assert second.message.endswith("load a saved version, or start with a new adapter.")
