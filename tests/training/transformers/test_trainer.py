from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from transformers import TrainingArguments

from nbpeft.errors import CheckpointError, CheckpointNotFoundError
from nbpeft.model import LoraConfig
from nbpeft.training import Collator, Run, RunCallback, Trainer, adapter_trainer
from nbpeft.training.transformers.trainer_patch import load_adapters
from tests.closeness import assert_close
from tests.tiny_models import llama
from tests.training.support import token_rows, trainable, weights


def arguments(folder: Path, **fields):
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(settings | fields))


def trainer_for(model, folder, rows=None, **fields):
    options = {key: fields.pop(key) for key in ("eval_dataset", "trainer_class", "data_collator") if key in fields}
    cls = options.pop("trainer_class", Trainer)
    trainer = cls(
        model=model,
        args=arguments(folder, **fields),
        train_dataset=rows if rows is not None else token_rows(),
        data_collator=options.pop("data_collator", Collator(copy_labels=True)),
        **options,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_same_losses_as_with_peft(tmp_path):
    ours = trainable()
    trainer = trainer_for(ours, tmp_path / "ours", gradient_accumulation_steps=2)
    ours.save_pretrained(str(tmp_path / "start"))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "start", is_trainable=True)
    oracle = trainer_for(theirs, tmp_path / "theirs", trainer_class=transformers.Trainer, gradient_accumulation_steps=2)
    trainer.train()
    oracle.train()
    assert_close(losses(trainer), losses(oracle))
    assert trainer.model_accepts_loss_kwargs == oracle.model_accepts_loss_kwargs
    assert trainer._loss_shifts_labels == oracle._loss_shifts_labels
    assert trainer.label_names == oracle.label_names == ["labels"]
    assert trainer.can_return_loss == oracle.can_return_loss


def test_label_smoothing_shifts_labels_as_with_peft(tmp_path):
    ours = trainable()
    ours.save_pretrained(str(tmp_path / "start"))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "start", is_trainable=True)
    trainer = trainer_for(ours, tmp_path, label_smoothing_factor=0.1)
    oracle = trainer_for(theirs, tmp_path, trainer_class=transformers.Trainer, label_smoothing_factor=0.1)
    trainer.train()
    oracle.train()
    assert_close(losses(trainer), losses(oracle))


def test_a_checkpoint_holds_the_adapter_only_and_peft_reads_it(tmp_path):
    model = trainable()
    trainer_for(model, tmp_path, save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "checkpoint-6"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
    }
    assert not {name for name in names if name.startswith(("model", "pytorch_model")) or name == "config.json"}
    assert (tmp_path / "checkpoint-3" / "adapter_config.json").is_file()
    theirs = peft.PeftModel.from_pretrained(llama(), folder)
    tokens = torch.tensor([token_rows()[0]["input_ids"]])
    assert_close(model.eval()(input_ids=tokens).logits, theirs.eval()(input_ids=tokens).logits)


def test_other_adapters_lie_in_subfolders(tmp_path):
    model = trainable(llama(), name="sql")
    model.add_adapter("default", LoraConfig(r=2, target_modules=["v_proj"]))
    trainer = trainer_for(model, tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    assert json.loads((folder / "sql" / "adapter_config.json").read_text())["r"] == 4
    after = weights(model)
    fresh = trainable(llama(), name="sql")
    fresh.add_adapter("default", LoraConfig(r=2, target_modules=["v_proj"]))
    load_adapters(fresh, folder)
    assert fresh.active_adapters == ["sql"]
    restored = weights(fresh)
    assert restored.keys() == after.keys()
    assert all(torch.equal(restored[name], after[name]) for name in after)


@pytest.mark.parametrize("name", ["default", "sql"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, name):
    whole = trainer_for(trainable(llama(), name=name, lora_dropout=0.2), tmp_path / "whole", max_steps=8)
    whole.train()
    first = trainer_for(
        trainable(llama(), name=name, lora_dropout=0.2), tmp_path, save_strategy="steps", save_steps=4, max_steps=8
    )
    first.train()
    assert losses(first) == losses(whole)
    model = trainable(llama(), name=name, lora_dropout=0.2)
    resumed = trainer_for(model, tmp_path, max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    expected, found = weights(whole.model), weights(model)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_weights_are_restored_in_place(tmp_path):
    model = trainable()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.save_pretrained(str(tmp_path / "saved"))
    before = weights(model)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1.0)
    load_adapters(model, tmp_path / "saved")
    now = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(one is other for one, other in zip(parameters, now, strict=True))
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_loading_what_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="none of the model's adapters"):
        load_adapters(trainable(), tmp_path)
    trainable(r=2).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError):
        load_adapters(trainable(r=4), tmp_path)
    trainable(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="was its config changed"):
        load_adapters(trainable(), tmp_path)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = trainable()
    trainer = trainer_for(
        model,
        tmp_path,
        eval_dataset=token_rows(),  # learned from, so that the loss only falls
        max_steps=8,
        learning_rate=3e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,
        metric_for_best_model="eval_loss",
    )
    seen = {}

    class Keep(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen[state.global_step] = (metrics["eval_loss"], weights(model))

    trainer.add_callback(Keep())
    trainer.train()
    best = max(seen, key=lambda step: seen[step][0])
    assert best != 8, "the test needs a best step before the last"
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert all(torch.equal(seen[best][1][name], value) for name, value in weights(model).items())


def test_save_model_writes_the_adapter(tmp_path):
    model = trainable()
    trainer_for(model, tmp_path).save_model(str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_args.bin",
    }


def test_columns_the_base_does_not_know_are_left_out(tmp_path):
    rows = datasets.Dataset.from_list([row | {"note": "text", "score": 0.5} for row in token_rows()])
    trainer = trainer_for(trainable(), tmp_path, rows, max_steps=2)
    trainer.train()
    assert "note" not in trainer._remove_unused_columns(rows).column_names
    assert trainer._remove_unused_columns(rows).column_names == ["input_ids"]


def test_a_model_that_calls_itself_quantized_is_accepted(tmp_path):
    base = llama()
    base.is_quantized = True
    trainer_for(trainable(base), tmp_path, max_steps=2).train()
    base = llama()
    base.is_quantized = True
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_for(base, tmp_path)


def test_a_model_without_adapters_is_trained_as_ever(tmp_path):
    model = llama()
    trainer_for(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    trainer = trainer_for(llama(seed=3), tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3


def test_evaluate_predict_and_generate_work_after_training(tmp_path):
    model = trainable()
    trainer = trainer_for(model, tmp_path, max_steps=2, eval_dataset=token_rows(6, seed=2))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(token_rows(6, seed=2)).predictions.shape[0] == 6
    out = model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[0] == 1 and out.shape[1] > 3


def test_any_trainer_class_can_be_made_to_know_adapters(tmp_path):
    class Own(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            self.called = True
            return super().compute_loss(*args, **kwargs)

    made = adapter_trainer(Own)
    assert made is Own and adapter_trainer(Trainer) is Trainer
    trainer = trainer_for(trainable(), tmp_path, trainer_class=made, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.called
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_the_callback_feeds_a_run_without_a_block(tmp_path):
    model = trainable()
    run = Run(model, None)
    trainer = trainer_for(model, tmp_path, eval_dataset=token_rows(4), eval_strategy="steps", eval_steps=3)
    trainer.add_callback(RunCallback(run))
    trainer.train()
    state = run.state
    assert (state.status, state.step, state.total_steps) == ("finished", 6, 6)
    assert [loss for _, loss in state.history] == pytest.approx(losses(trainer))
    assert [step for step, _ in state.eval_history] == [3, 6]
    assert state.learning_rate == [entry for entry in trainer.state.log_history if "loss" in entry][-1]["learning_rate"]
    assert 6 * 4 * 4 <= run.token_count < 6 * 4 * 12, "six batches of four rows with 4 to 11 tokens"


def test_stop_without_a_block_ends_training_and_writes_a_checkpoint(tmp_path):
    model = trainable()
    run = Run(model, None)
    trainer = trainer_for(model, tmp_path, max_steps=50, save_strategy="steps", save_steps=1000)

    class Click(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                run.control.request_stop("clicked")

    trainer.add_callback(Click())
    trainer.add_callback(RunCallback(run))
    trainer.train()
    assert run.state.status == "stopped" and run.state.message == "stopped at step 3: clicked"
    assert (tmp_path / "checkpoint-3" / "optimizer.pt").is_file()
