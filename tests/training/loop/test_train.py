from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import datasets
import pytest
import torch
import transformers

from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import AdapterExistsError, ConfigError, TrainingError, TrainingInterrupted
from nbpeft.model import PeftModel
from nbpeft.session import Session
from nbpeft.state import TrainState
from nbpeft.training import RunControl, TrainResult, train
from tests.closeness import assert_close
from tests.pretend_cpu import pretend_cpu
from tests.tiny_models import checkpoints_activations, llama
from tests.training.support import token_rows, trainable, weights
from tests.waiting import PATIENCE

QUICK: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 5}


class At(transformers.TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def test_a_cell_trains_and_gets_a_result(capsys):
    model = trainable()
    states: list[TrainState] = []
    before = weights(model)
    rows = token_rows(16)
    result = train(model, rows, token_rows(4, seed=3), num_train_epochs=2, publish=states.append, learning_rate=1e-2)
    assert isinstance(result, TrainResult)
    assert (result.status, result.adapter, result.steps, result.total_steps) == ("finished", "default", 4, 4)
    assert result.token_count == 2 * sum(len(row["input_ids"]) for row in rows)
    assert result.eval_loss == result.state.eval_history[-1][1] and len(result.state.eval_history) == 2
    assert states[0].status == "running" and states[-1] == result.state and result.message == ""
    assert str(result).startswith("default finished · 4 steps · ") and ">default finished</b>" in result._repr_html_()
    assert any(not torch.equal(before[name], value) for name, value in weights(model).items())
    assert capsys.readouterr().out == ""


def test_the_model_is_left_as_it_was_found():
    model = trainable().eval()
    model.get_base_model().config.use_cache = True
    attributes = set(vars(model))
    train(model, token_rows(), bf16=True, activation_checkpointing=True, **QUICK)
    assert not model.training and model.config.use_cache is True
    assert set(vars(model)) == attributes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not checkpoints_activations(model)
    assert not model.get_base_model().get_input_embeddings()._forward_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    model.train()
    train(model, token_rows(), **QUICK)
    assert model.training


def test_a_second_training_is_prepared_like_the_first():
    cast: list[bool] = []

    class Seeing(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            cast.append("_original_forward" in vars(model))

    model = trainable()
    for prepared in (False, False, True):
        if prepared:  # by a Trainer of transformers
            vars(model)["_is_accelerate_prepared"] = True
        train(model, token_rows(), bf16=True, callbacks=[Seeing()], max_steps=1)
        assert ("_is_accelerate_prepared" in vars(model)) is prepared and "forward" not in vars(model)
    assert cast == [True, True, True], "the forward pass is in bfloat16"


def test_nothing_is_kept_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(trainable(), token_rows(), **QUICK)
    assert list(tmp_path.iterdir()) == [] and result.output_dir is None
    model = trainable()
    result = train(model, token_rows(), output_dir="out", save_strategy="steps", save_steps=5, **QUICK)
    assert result.output_dir == "out" and result.token_count > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-5" / "optimizer.pt").is_file()
    twin = PeftModel.from_pretrained(llama(), str(tmp_path / "out"), is_trainable=True)
    assert all(torch.equal(value, weights(twin)[name]) for name, value in weights(model).items())
    more = train(twin, token_rows(), output_dir="out", resume_from_checkpoint=True, **(QUICK | {"max_steps": 7}))
    assert (more.steps, more.state.first_step) == (7, 5)
    assert [step for step, _ in more.state.history] == [1, 2, 3, 4, 5, 6, 7]  # the curve begins where the first run did


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def never_read():
    raise AssertionError("the rows are read")
    yield


@pytest.mark.parametrize(("base", "config"), [(llama, {}), (llama, {"r": 2}), (lambda: llama(seed=1), {})])
def test_another_adapter_s_folder_is_refused_before_the_rows_are_read(tmp_path, base, config):
    first = trainable()
    train(first, token_rows(8), output_dir=str(tmp_path), max_steps=1)
    before, second = files_in(tmp_path), trainable(base(), **config)
    weights_before = weights(second)
    with pytest.raises(
        AdapterExistsError,
        match=r"holds another adapter, .default. of another model: choose another folder for 'default'",
    ):
        train(second, never_read(), output_dir=str(tmp_path), max_steps=1)
    assert files_in(tmp_path) == before
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights_before.items())
    train(second, token_rows(8), output_dir=str(tmp_path), max_steps=1, replace=True)
    assert files_in(tmp_path) != before and manager_of(first).unsaved == {"default"}


def test_in_another_process_the_files_say_whose_folder_it_is(tmp_path, monkeypatch):
    train(trainable(name="sql"), token_rows(8), output_dir=str(tmp_path), max_steps=1)
    monkeypatch.setattr("nbpeft.model.saving.saved_places._owners", {})
    with pytest.raises(AdapterExistsError, match=r"sql holds an adapter with other tensors \(LORA, r=4\)"):
        train(trainable(name="sql", r=2), never_read(), output_dir=str(tmp_path), max_steps=1)
    train(trainable(name="sql"), token_rows(8), output_dir=str(tmp_path), max_steps=1)
    train(trainable(name="chat"), token_rows(8), output_dir=str(tmp_path), max_steps=1)  # goes into a folder of its own
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["chat", "sql"]


def test_an_adapter_is_trained_and_saved_again_into_its_folder(tmp_path):
    model = trainable()
    for _ in range(2):
        train(model, token_rows(8), output_dir=str(tmp_path), max_steps=1, save_strategy="steps", save_steps=1)
    resumed = {"resume_from_checkpoint": str(tmp_path / "checkpoint-1"), "output_dir": str(tmp_path)}
    train(trainable(), token_rows(8), max_steps=2, **resumed)


def test_the_trainer_is_not_kept_alive():
    model = trainable()
    trainers: list[weakref.ref[Any]] = []

    class Spy(transformers.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(weakref.ref(self))

        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            trainers.append(weakref.ref(optimizer))
            return optimizer

    train(model, token_rows(), trainer_class=Spy, **QUICK)
    gc.collect()
    assert len(trainers) == 2 and [reference() for reference in trainers] == [None, None]
    handle = weakref.ref(model)
    del model
    gc.collect()
    assert handle() is None


def test_stop_from_another_thread():
    model, control = trainable(), RunControl()
    before, learns = weights(model), threading.Event()
    threading.Thread(target=lambda: learns.wait(PATIENCE) and control.request_stop("enough")).start()
    settings: dict[str, Any] = {"max_steps": 100_000, "learning_rate": 1e-2, "callbacks": [At(2, learns.set)]}
    result = train(model, token_rows(), token_rows(4), control=control, **settings)
    assert result.status == "stopped" and 0 < result.steps < 100_000
    assert result.state.message == f"stopped at step {result.steps}: enough"
    assert str(result).startswith(f"default stopped · {result.steps:,} of 100,000 steps")
    assert any(not torch.equal(before[name], value) for name, value in weights(model).items())
    again = train(model, token_rows(), **QUICK)
    assert again.status == "finished"


def test_pause_and_resume():
    control, model = RunControl(), trainable()
    states: list[TrainState] = []
    pausing = At(2, control.pause)

    def resume():
        while not any(state.status == "paused" for state in states):
            time.sleep(0.01)
        time.sleep(0.2)
        control.resume()

    thread = threading.Thread(target=resume)
    thread.start()
    result = train(model, token_rows(), control=control, publish=states.append, callbacks=[pausing], **QUICK)
    thread.join(PATIENCE)
    assert result.status == "finished" and result.steps == 5
    paused = [state for state in states if state.status == "paused"]
    assert [state.step for state in paused] == [3]


def test_stop_between_the_batches_of_a_step():
    clicks, seen = RunControl(), []

    class Count(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)
            if len(seen) == 3:
                clicks.request_stop()

    result = train(
        trainable(),
        token_rows(64),
        control=clicks,
        callbacks=[Count()],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
    )
    assert (result.status, result.steps, len(seen)) == ("stopped", 0, 3)


def test_stop_during_an_evaluation_ends_it():
    clicks, model = RunControl(), trainable()
    batches = []

    class Click(transformers.TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            batches.append(1)
            clicks.request_stop()

    result = train(
        model,
        token_rows(),
        token_rows(32),
        control=clicks,
        callbacks=[Click()],
        eval_steps=1,
        per_device_eval_batch_size=1,
        **QUICK,
    )
    assert result.status == "stopped" and result.steps == 1 and len(batches) == 1


def test_a_keyboard_interrupt_keeps_what_was_learned_and_goes_on():
    def interrupt():
        raise KeyboardInterrupt

    model = trainable()
    with pytest.raises(TrainingInterrupted) as caught:
        train(model, token_rows(), callbacks=[At(3, interrupt)], learning_rate=1e-3, **QUICK)
    result = caught.value.result
    assert str(caught.value).startswith("default stopped · 3 of 5 steps") and "kept" in str(caught.value)
    assert result.status == "stopped" and result.steps == 3
    assert result.state.message == "stopped at step 3"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_interrupted_before_a_step_nothing_is_called_kept():
    def interrupt():
        raise KeyboardInterrupt

    model = trainable()
    before = weights(model)
    with pytest.raises(TrainingInterrupted, match=r"default stopped · 0 of 5 steps .* · the adapters are unchanged$"):
        train(model, token_rows(), callbacks=[At(0, interrupt)], **QUICK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_the_first_step_has_changed_before_it_ended_is_not_called_unchanged(error):
    class Failing(transformers.TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            raise error

    session, model = Session(), trainable()
    session.register(model, name="model")
    before = weights(model)
    with pytest.raises((TrainingInterrupted, error)) as caught:
        session.train(model, token_rows(), callbacks=[Failing()], keep=False, **QUICK)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    told = "its first step had begun to change the adapters"
    assert told in str(caught.value) or error is ZeroDivisionError
    assert model.manager.unsaved == {"default"}


def test_interrupted_with_a_folder_still_saves_the_adapter(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted):
        train(trainable(), token_rows(), callbacks=[At(3, interrupt)], output_dir=str(tmp_path), **QUICK)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_other_errors_pass_through_and_the_model_stays_usable():
    def fail():
        raise ZeroDivisionError("in a callback")

    model = trainable()
    states: list[TrainState] = []
    with pytest.raises(ZeroDivisionError):
        train(model, token_rows(), callbacks=[At(2, fail)], publish=states.append, **QUICK)
    assert states[-1].status == "failed" and states[-1].message == "ZeroDivisionError: in a callback"
    assert train(model, token_rows(), **QUICK).status == "finished"


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_change_and_lets_go(error):
    kept = []

    class Hungry(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            activations = torch.zeros(1000)
            kept.append(weakref.ref(activations))
            loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
            loss.backward()
            raise error

    model = trainable()
    states: list[TrainState] = []
    with pytest.raises(TrainingError, match="per_device_train_batch_size 8 -> 4 saves") as caught:
        train(model, token_rows(), trainer_class=Hungry, publish=states.append, **QUICK)
    assert "\n" not in str(caught.value) and "at batch size 8" in str(caught.value)
    assert caught.value.__context__ is None and kept[0]() is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert states[-1].status == "failed" and states[-1].message.startswith("Out of memory")
    assert train(model, token_rows(), **QUICK).status == "finished"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),
        ("learning_rat", "learning_rate"),
        ("max_step", "max_steps"),
        ("callback", "callbacks"),
        ("evaluation_strategy", "eval_strategy"),
        ("simpo_gama", "simpo_gamma"),
        ("completion_length", "max_completion_length"),
    ],
)
def test_unknown_arguments_name_the_near_ones(wrong, right):
    with pytest.raises(ConfigError, match=f"{wrong!r} is not a field of TrainingArguments.*{right}"):
        train(trainable(), token_rows(), **dict[str, Any]({wrong: 1}))


def test_one_step_is_one_step():
    assert " · 1 step · " in str(train(trainable(), token_rows(), max_steps=1))


def test_impossible_arguments_are_one_line():
    with pytest.raises(ConfigError, match="Invalid training arguments") as caught:
        train(trainable(), token_rows(), accelerator_config={"x": 1})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^lr_scheduler_type 'cosin' is unknown\. Did you mean 'cosine'") as caught:
        train(trainable(), token_rows(), lr_scheduler_type="cosin")
    assert caught.value.details == {"field": "lr_scheduler_type", "value": "cosin"}
    with pytest.raises(ConfigError, match=r"^optim 'zzz' is unknown\. It is one of: adamw_torch, "):
        train(trainable(), token_rows(), optim="zzz")
    with pytest.raises(ConfigError, match="set their folder with output_dir"):
        train(trainable(), token_rows(), save_strategy="steps")
    with pytest.raises(ConfigError, match="pass eval_data"):
        train(trainable(), token_rows(), load_best_model_at_end=True)


def test_models_that_cannot_train_are_refused_at_once():
    with pytest.raises(TrainingError, match=r"model is a str \('model'\), not a model"):
        train("model", token_rows())  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="has no adapters"):
        train(llama(), token_rows())
    model = trainable()
    model.manager.freeze("default")
    with pytest.raises(TrainingError, match=r"Nothing is trainable .active adapters: 'default'"):
        train(model, token_rows())


def test_adapters_that_do_not_act_are_refused():
    model = trainable()
    model.merge_adapter()
    with pytest.raises(TrainingError, match=r"Merged adapters cannot be trained \('default'\)"):
        train(model, token_rows())
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(TrainingError, match="adapters are disabled"):
        train(model, token_rows())


def test_the_run_is_named_after_what_trains():
    from nbpeft.model import LoraConfig

    model = trainable()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.manager.activate(["default", "other"])
    model.manager.freeze("other")
    assert train(model, token_rows(), **QUICK).adapter == "default"
    model.manager.unfreeze("other")
    assert train(model, token_rows(), **QUICK).adapter == "default, other"


def test_a_loss_that_is_nan_is_said():
    class Lost(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            loss: Any = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 3 else loss

    with pytest.warns(UserWarning, match="Training stopped: the loss is NaN"):
        result = train(trainable(), token_rows(), trainer_class=Lost, **QUICK)
    assert "stopped at step 4: the loss is NaN" in str(result)
    with pytest.warns(UserWarning, match="The loss is NaN since step 4"):
        result = train(trainable(), token_rows(), trainer_class=Lost, stop_on_divergence=False, **QUICK)
    assert "NaN since step 4" in str(result)


def test_an_interrupted_run_leaves_no_noise_on_the_embeddings():
    def interrupt():
        raise KeyboardInterrupt

    model = trainable()
    with pytest.raises(TrainingInterrupted):
        train(model, token_rows(), callbacks=[At(2, interrupt)], neftune_noise_alpha=5.0, **QUICK)
    assert not model.get_input_embeddings()._forward_hooks


def test_best_model_with_one_argument():
    model = trainable()
    result = train(
        model, token_rows(), token_rows(4), load_best_model_at_end=True, eval_steps=1, learning_rate=1e-2, **QUICK
    )
    assert [step for step, _ in result.state.eval_history] == [1, 2, 3, 4, 5]
    best = min(loss for _, loss in result.state.eval_history)
    with pytest.warns(UserWarning, match="No weight of adapter 'default' has changed in 1 step"):
        fresh = train(model, token_rows(), token_rows(4), max_steps=1, learning_rate=0.0)
    assert "is the learning rate zero" in fresh.message
    assert_close(fresh.eval_loss, best)


def test_a_bf16_base_keeps_its_dtype_and_learns():
    model = trainable(llama(dtype=torch.bfloat16))
    result = train(model, token_rows(), learning_rate=3e-2, per_device_train_batch_size=32, max_steps=30)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora" not in name} == {torch.bfloat16}
    assert {value.dtype for value in weights(model).values()} == {torch.float32}
    assert result.state.history[-1][1] < result.state.history[0][1] - 0.1


def test_a_processor_that_is_slow_in_bf16_is_told_once(monkeypatch):
    told = "this CPU has no instructions for bfloat16; float32 is many times faster: "
    given: dict[str, Any] = {"max_steps": 1, "learning_rate": 1e-3}
    pretend_cpu(monkeypatch)
    model = trainable(llama(dtype=torch.bfloat16))
    assert train(model, token_rows(), **given).message == f"{told}load models with dtype=torch.float32"
    assert train(trainable(), token_rows(), **given).message == ""
    assert train(trainable(), token_rows(), **given, bf16=True).message == f"{told}leave bf16=True out"
    pretend_cpu(monkeypatch, onednn=[torch.bfloat16])
    assert train(model, token_rows(), **given).message == ""


def test_only_the_active_adapter_changes():
    from nbpeft.model import LoraConfig

    model = trainable()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    other = {name: part.detach().clone() for name, part in model.named_parameters() if ".other." in name}
    assert train(model, token_rows(), **QUICK).adapter == "default"
    parameters = dict(model.named_parameters())
    assert other and all(torch.equal(parameters[name], value) for name, value in other.items())


def test_a_dataset_with_further_columns():
    rows = datasets.Dataset.from_list([row | {"source": "web"} for row in token_rows()])
    assert train(trainable(), rows, **QUICK).steps == 5


@pytest.mark.parametrize("token", [10**6, -1])
def test_a_padding_token_that_the_model_does_not_know_is_not_used(token):
    model, usual = trainable(), trainable()
    model.get_base_model().config.pad_token_id = token
    rows = [{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3, 4]}]
    losses = [train(one, rows, max_steps=1).loss for one in (model, usual)]
    assert losses[0] == losses[1]


def test_a_classifier_trains_its_head():
    from nbpeft.model import LoraConfig, get_peft_model

    config = llama().config
    config.num_labels, config.pad_token_id = 3, 0
    base = transformers.LlamaForSequenceClassification(config)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    rows = [row | {"label": index % 3} for index, row in enumerate(token_rows(24))]
    before = weights(model)
    result = train(model, rows, learning_rate=1e-2, per_device_train_batch_size=8, max_steps=10)
    assert result.message == ""
    assert any("score" in name and not torch.equal(before[name], now) for name, now in weights(model).items())


def test_reentrant_checkpointing_over_frozen_embeddings_names_the_remedy():
    model = trainable()
    base = model.get_base_model()
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads()
    with pytest.raises(TrainingError, match="enable_input_require_grads"):
        train(model, token_rows(), **QUICK)
    model.enable_input_require_grads()
    assert train(model, token_rows(), learning_rate=1e-3, **QUICK).message == ""
