"""Losses in chunks in a Trainer: equal to whole logits, in use by default, and given up where logits are needed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.losses import lazy_logits
from nbpeft.training import Collator, Trainer, train
from tests.closeness import DEPTH, assert_close
from tests.tiny_models import classifier, llama
from tests.training.support import token_rows, trainable, weights


@pytest.fixture
def chunked(monkeypatch):
    """The number of losses that were computed in chunks."""
    calls: list[int] = []

    def counted(*args, **options):
        calls.append(options["chunk_size"])
        return original(*args, **options)

    original = lazy_logits.chunked_cross_entropy
    monkeypatch.setattr(lazy_logits, "chunked_cross_entropy", counted)
    return calls


def trained(model=None, rows=None, evaluation=None, **arguments):
    model = trainable(lora_dropout=0.0) if model is None else model
    settings = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    result = train(model, token_rows() if rows is None else rows, evaluation, **settings | arguments)
    return result, weights(model)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.2}, {"bf16": True}],
    ids=["plain", "accumulated", "smoothed", "autocast"],
)
def test_what_is_learned_is_the_same(arguments, chunked):
    result, learned = trained(**arguments)
    assert set(chunked) == {128}
    count = len(chunked)
    whole, expected = trained(loss_chunk_size=0, **arguments)
    assert len(chunked) == count
    dtype = torch.bfloat16 if "bf16" in arguments else torch.float32
    assert_close(result.train_loss, whole.train_loss, dtype=dtype)
    # Adam's steps are of one size, however small a gradient is: what it was rounded to shows in the weight.
    assert_close(learned, expected, depth=3 * 3 * DEPTH, dtype=dtype)  # three steps


def test_evaluations_are_in_chunks_where_nobody_needs_logits(chunked):
    result, _ = trained(evaluation=token_rows(6, seed=1), eval_strategy="steps", eval_steps=3, loss_chunk_size=5)
    assert len(chunked) == 4
    whole, _ = trained(evaluation=token_rows(6, seed=1), eval_strategy="steps", eval_steps=3, loss_chunk_size=0)
    assert_close(result.eval_loss, whole.eval_loss)


def test_metrics_get_the_logits_that_they_would(chunked):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"highest": float(np.max(prediction.predictions))}

    for size in (128, 0):
        trained(
            evaluation=token_rows(5, seed=1),
            eval_strategy="steps",
            eval_steps=3,
            compute_metrics=compute_metrics,
            loss_chunk_size=size,
        )
    assert len(chunked) == 3
    assert_close(torch.from_numpy(seen[0]), torch.from_numpy(seen[1]))


def test_outputs_have_their_logits(chunked, tmp_path):
    model = trainable()
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=token_rows(), data_collator=Collator(copy_labels=True))
    batch = Collator(copy_labels=True)(token_rows(3))
    loss, outputs = trainer.compute_loss(model, copy.copy(batch), return_outputs=True)
    assert not chunked
    assert torch.equal(outputs.logits, model(**batch).logits)
    assert_close(trainer.compute_loss(model, batch), loss)
    assert len(chunked) == 1


def test_a_loss_function_of_ones_own_is_served(chunked):
    def own(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[..., :-1, :].reshape(-1, outputs.logits.size(-1))
        return torch.nn.functional.cross_entropy(logits, labels[..., 1:].reshape(-1), label_smoothing=0.3)

    _, learned = trained(compute_loss_func=own)
    assert len(chunked) == 3
    _, expected = trained(compute_loss_func=own, loss_chunk_size=0)
    assert_close(learned, expected)


def test_a_model_that_needs_its_logits_is_trained_from_them_with_one_note(chunked):
    base = llama()
    base.loss_function = lambda logits, labels, **unused: logits.float().logsumexp(-1).mean()
    result, _ = trained(trainable(base))
    assert not chunked
    assert result.message.count("the loss is computed from complete logits: logsumexp needs them") == 1


def test_models_without_a_head_are_trained_without_a_word():
    rows = [row | {"labels": index % 3} for index, row in enumerate(token_rows(8))]
    result, _ = trained(trainable(classifier(), task_type="SEQ_CLS"), rows)
    assert "logits" not in result.message


@pytest.mark.parametrize("size", [-3, 1.5, "all"])
def test_another_chunk_size_is_refused_in_one_line(size):
    with pytest.raises(ConfigError, match=r"^loss_chunk_size must be a whole number of tokens, or 0 for"):
        trained(loss_chunk_size=size)


def test_a_plain_trainer_is_left_alone(chunked, tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    collator = Collator(copy_labels=True)
    transformers.Trainer(trainable(), arguments, train_dataset=token_rows(), data_collator=collator).train()
    assert not chunked
    assert nbpeft.Trainer is Trainer
