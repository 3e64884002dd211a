"""A weight of a row, or of a turn of the assistant, says how much the loss on it counts; 0 is not learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from nbpeft import sweep
from nbpeft.errors import TrainingError
from nbpeft.training import prepare_data, train
from nbpeft.training.loop.rows import first_rows, training_rows
from nbpeft.training.request import TrainRequest
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close, assert_same, is_close
from tests.tiny_models import classifier, llama
from tests.training.support import trainable, weights
from tests.training.test_data import Slow
from tests.training.test_data import tokenizer as tokenizer

CHARACTERS = CharTokenizer()
USER, REPLY, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "is it?"), ("assistant", "yes"), ("assistant", "no"))
)
ONCE, TWICE = {"prompt": "a", "completion": "bcd"}, {"prompt": "ef", "completion": "gh"}


def learned(model: Any, rows: Any, **arguments: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a step learns: with gradients so clear that rounding does not show."""
    usual = {"tokenizer": CHARACTERS, "max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 3}
    return train(model, rows, **usual | {"optim": "sgd"} | arguments), weights(model)


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"loss_chunk_size": 0},
        {"loss_chunk_size": 2},
        {"label_smoothing_factor": 0.2},
        {"label_smoothing_factor": 0.2, "loss_chunk_size": 0},
    ],
)
def test_a_row_that_counts_twice_is_learned_as_if_it_were_there_twice(arguments: Any) -> None:
    found = learned(trainable(), [ONCE, {**TWICE, "weight": 2}], **arguments)
    expected = learned(trainable(), [ONCE, TWICE, TWICE], **arguments)
    assert_close(found[0].train_loss, expected[0].train_loss)
    assert_close(found[1], expected[1])
    assert not is_close(found[0].train_loss, learned(trainable(), [ONCE, TWICE])[0].train_loss)


@pytest.mark.parametrize(
    "arguments",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"packing": True, "max_length": 16},
        {"packing": True, "max_length": 7, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    ],
    ids=["accumulated", "packed", "packed and accumulated"],
)
def test_weights_are_over_all_rows_of_a_step(arguments: Any) -> None:
    rows = [{**ONCE, "weight": 0.5}, {**TWICE, "weight": 3}]
    found, expected = learned(trainable(), rows, **arguments), learned(trainable(), rows)
    assert_close(found[0].train_loss, expected[0].train_loss)
    assert_close(found[1], expected[1])


def test_adapters_side_by_side_count_alike() -> None:
    rows = [ONCE, {**TWICE, "weight": 3}] * 2
    model = trainable(name="a")
    learned(model, rows, learning_rate=sweep(0.01, 0.05))
    for name, rate in (("a-lr1e-2", 0.01), ("a-lr5e-2", 0.05)):
        alone = trainable(name="a")
        learned(alone, rows, learning_rate=rate)
        for one, other in zip(model.manager.parameters(name), alone.manager.parameters("a"), strict=True):
            assert_close(one, other)


def test_weights_count_in_evaluations() -> None:
    rows, arguments = [ONCE, TWICE], {"eval_strategy": "steps", "eval_steps": 2}
    found = learned(trainable(), rows, eval_data=[ONCE, {**TWICE, "weight": 2}], **arguments)[0]
    expected = learned(trainable(), rows, eval_data=[ONCE, TWICE, TWICE], **arguments)[0]
    assert_close(found.eval_loss, expected.eval_loss)


def test_rows_of_a_stream_count_by_their_weights() -> None:
    import datasets

    stream = datasets.Dataset.from_list([{**ONCE, "weight": 1.0}, {**TWICE, "weight": 2.0}]).to_iterable_dataset()
    found = learned(trainable(), stream, max_steps=1, per_device_train_batch_size=2)
    expected = learned(trainable(), [ONCE, TWICE, TWICE], max_steps=1)
    assert_close(found[0].train_loss, expected[0].train_loss)


def test_a_class_counts_by_the_weight_of_its_row() -> None:
    rows = [{"text": "ab", "label": 0}, {"text": "cd", "label": 2}]
    made = lambda: trainable(classifier(), task_type="SEQ_CLS")  # noqa: E731
    found = learned(made(), [rows[0], {**rows[1], "weight": 2}])
    expected = learned(made(), [rows[0], rows[1], rows[1]])
    assert_close(found[0].train_loss, expected[0].train_loss)


@pytest.mark.parametrize("weight", [0, 0.0, False, "0", torch.tensor(0)])
def test_a_weight_of_zero_is_not_learned(weight: Any) -> None:
    rows = prepare_data([ONCE, {**TWICE, "weight": weight}], CHARACTERS)
    assert list(rows) == list(prepare_data([ONCE], CHARACTERS)) and rows.left_out == ((1, "its weight is 0"),)
    assert list(prepare_data([{**ONCE, "weight": 1}, {**TWICE, "weight": None}], CHARACTERS)) == list(
        prepare_data([ONCE, TWICE], CHARACTERS)
    )


@pytest.mark.parametrize("slow", [False, True])
def test_turns_of_the_assistant_are_masked_and_weighted(tokenizer: Any, slow: bool) -> None:
    either = Slow(tokenizer) if slow else tokenizer

    def of(first: Any, second: Any, **row: Any) -> dict[str, Any]:
        turns = [USER, {**REPLY, "weight": first}, USER, {**OTHER, "weight": second}]
        [found] = prepare_data([{"messages": turns, **row}], either)
        return dict(found)

    whole, last = of(1, 1), of(0, 1)
    assert "loss_weights" not in whole and "loss_weights" not in last
    assert either.decode([label for label in last["labels"] if label != -100]) == "no<|end|>\n"
    counted = of(0.5, 2)
    assert counted["labels"] == whole["labels"]
    by_label = {
        weight for label, weight in zip(counted["labels"], counted["loss_weights"], strict=True) if label != -100
    }
    assert by_label == {0.5, 2.0}
    assert {weight for weight in of(0.5, 2, weight=3)["loss_weights"] if weight} == {1.5, 6.0}
    nothing = prepare_data([{"messages": [USER, {**REPLY, "weight": 0}]}, {"messages": [USER, REPLY]}], either)
    assert nothing.left_out == ((0, "the weights of its turns are 0"),)


def test_weights_of_what_is_not_learned_are_named(tokenizer: Any) -> None:
    chat = [{**USER, "weight": 1}, {**REPLY, "weight": 1}]
    assert prepare_data([{"messages": chat}], tokenizer).notes == "not used: 'weight' of user messages"
    assert prepare_data([{"messages": [{**USER, "weight": 0}, REPLY]}], tokenizer).notes == ""
    pair = {"prompt": [*chat, USER], "completion": [OTHER]}
    assert prepare_data([pair], tokenizer).notes == (
        "not used: 'weight' of assistant messages of the prompt, 'weight' of user messages of the prompt"
    )


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "much", "", [1], "-0.5"])
def test_what_is_no_weight_is_refused(tokenizer: Any, weight: Any) -> None:
    with pytest.raises(TrainingError, match=r"^Row 1: 'weight' is .*; expected a number of at least 0\. "):
        prepare_data([ONCE, {**TWICE, "weight": weight}], CHARACTERS)
    with pytest.raises(TrainingError, match=r"^Row 0: 'weight' of message 1 of 'messages' is .*; expected a number"):
        prepare_data([{"messages": [USER, {**REPLY, "weight": weight}]}], tokenizer)


def test_columns_of_weights_may_be_called_otherwise() -> None:
    rows = prepare_data([{**ONCE, "prompt": "a ", "quality": "0.5"}], CHARACTERS, columns={"weight": "quality"})
    assert {weight for weight in rows[0]["loss_weights"] if weight} == {0.5} and rows.notes == ""


def test_a_trainer_that_takes_no_weights_is_refused() -> None:
    model, rows = trainable(), [ONCE, {**TWICE, "weight": 2}]
    with pytest.raises(
        TrainingError, match=r"^Row 1: its weight is neither 0 nor 1, and transformers\.\S+ does not support weights"
    ):
        learned(model, rows, trainer_class=transformers.Trainer)
    with pytest.raises(TrainingError, match="the given data_collator does not add them to its batches"):
        learned(model, rows, data_collator=lambda found: {})
    masked = [ONCE, {**TWICE, "weight": 0}, {**TWICE, "weight": 1}]
    assert learned(model, masked, trainer_class=transformers.Trainer)[0].steps == 2


@pytest.mark.parametrize("problem", ["a loss of its own", "regression", "compiled"])
def test_a_loss_that_takes_no_weights_is_refused_before_a_step(problem: str) -> None:
    base = classifier(num_labels=1) if problem == "regression" else llama()
    rows = [{"text": "ab", "label": 0.5, "weight": 2}] if problem == "regression" else [{**ONCE, "weight": 2}]
    if problem == "a loss of its own":
        base.loss_function = lambda logits, labels, **unused: logits.float().logsumexp(-1).mean()
    model = trainable(base, **({"task_type": "SEQ_CLS"} if problem == "regression" else {}))
    before = weights(model)
    with pytest.raises(TrainingError, match=r"weight.*(does not use them|takes none|does not take|does not support)"):
        learned(model, rows, **({"torch_compile": True} if problem == "compiled" else {}))
    assert_same(weights(model), before)


def test_tokenised_rows_have_masks_and_weights_as_trl_has_them() -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": [1, 2, 3, 4], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1], "weight": 0.5},
        {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1, 1], "loss_weights": [1, 2]},
        {"input_ids": [7, 8], "completion_mask": [0, 0]},
    ]
    found = prepare_data(rows)
    assert found.left_out == ((2, "nothing to learn"),)
    assert found[0] == {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "loss_weights": [0.5] * 4}
    assert found[1] == {**rows[1], "loss_weights": [1.0, 2.0]}
    with pytest.raises(TrainingError, match="Row 0: 'completion_mask' has 1 numbers for 2 labels"):
        prepare_data([{"input_ids": [1, 2], "completion_mask": [1]}])
    with pytest.raises(TrainingError, match="Row 0: 'loss_weights' has a number that is negative or not finite"):
        prepare_data([{"input_ids": [1, 2], "loss_weights": [1, -1]}])


def test_rows_to_start_from_count_by_their_weights() -> None:
    """For inits that look at a loss, the batch's labels have the weights."""
    model = trainable()
    [batch] = first_rows(model, [ONCE, {**TWICE, "weight": 2}], rows=8, tokenizer=CHARACTERS).batches()
    expected = train_loss(model, [ONCE, TWICE, TWICE])
    assert_close(model(**batch).loss, expected)


def train_loss(model: Any, rows: Any) -> Any:
    found = training_rows(TrainRequest(model, rows, tokenizer=CHARACTERS)).train
    [batch] = first_rows(model, list(found), rows=8).batches()
    return model(**batch).loss
