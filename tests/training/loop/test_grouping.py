"""Rows about as long share a batch: less padding, every row once an epoch, and the same order on every day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset

from nbpeft.training import Trainer, train
from nbpeft.training.data import TokenizedRows
from nbpeft.training.data.lengths import GroupedByLength, lengths_of
from nbpeft.training.loop.grouping import group_rows, wants_groups
from tests.training.support import token_rows, trainable, weights

GIVEN: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 0.02, "seed": 5}


def drawn(count: int, seed: int = 0) -> list[int]:
    return torch.randint(8, 160, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def padding(lengths: list[int], order: list[int], size: int) -> float:
    """Padding tokens for each token of a row."""
    batches = [[lengths[row] for row in order[start : start + size]] for start in range(0, len(order), size)]
    return sum(max(batch) * len(batch) for batch in batches) / sum(lengths) - 1


def batches_of(rows: list[dict[str, Any]], **given: Any) -> list[list[list[int]]]:
    """The batches of a training, each as the rows it holds without their padding."""
    seen: list[list[list[int]]] = []
    model = trainable()

    def note(module: Any, args: Any, batch: dict[str, Any]) -> None:
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        seen.append([ids[mask.bool()].tolist() for ids, mask in pairs])

    model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    train(model, rows, **GIVEN | given)
    return seen


@pytest.mark.parametrize("count", [1, 7, 8, 64, 1001])
def test_an_epoch_sees_every_row_once_in_an_order_of_its_own(count: int) -> None:
    lengths, epoch = drawn(count), 0
    sampler = GroupedByLength(lengths, 8, 3, lambda: epoch)
    first = list(sampler)
    assert sorted(first) == list(range(count)) and len(sampler) == count and list(sampler) == first
    epoch = 1
    second = list(sampler)
    assert sorted(second) == list(range(count)) and (second != first or count == 1)
    if count > 64:  # and in batches of its own
        assert {frozenset(first[start : start + 8]) for start in range(0, 1000, 8)} != {
            frozenset(second[start : start + 8]) for start in range(0, 1000, 8)
        }


@pytest.mark.parametrize("count", [64, 1000])
def test_padding_is_a_fraction_of_that_of_a_random_order(count: int) -> None:
    lengths = drawn(count)
    order = list(GroupedByLength(lengths, 8, 3, lambda: 0))
    random = torch.randperm(count, generator=torch.Generator().manual_seed(3)).tolist()
    assert padding(lengths, order, 8) < 0.35 * padding(lengths, random, 8)


def test_the_longest_row_is_in_the_first_batch_and_rows_left_over_are_any() -> None:
    lengths = drawn(67)
    orders = [list(GroupedByLength(lengths, 8, seed, lambda: 0)) for seed in range(40)]
    longest = max(range(67), key=lengths.__getitem__)
    assert all(longest in order[:8] or longest in order[-3:] for order in orders)
    left_over = [lengths[row] for order in orders for row in order[-3:]]
    assert min(left_over) < 30 and max(left_over) > 130


def test_lengths_are_known_of_lists_datasets_and_parts_of_them() -> None:
    datasets = pytest.importorskip("datasets")
    rows = token_rows(6)
    expected = [len(row["input_ids"]) for row in rows]
    assert lengths_of(TokenizedRows(rows)) == lengths_of(rows) == expected
    assert lengths_of(datasets.Dataset.from_list(rows)) == expected
    assert lengths_of(Subset(TokenizedRows(rows), [2, 0])) == [expected[2], expected[0]]
    assert lengths_of([{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0]}]) == [2]
    assert lengths_of([{"pixel_values": [1.0]}]) is None
    assert lengths_of(datasets.Dataset.from_list([{"text": "a"}])) is None
    assert lengths_of(iter(rows)) is None


def test_a_training_groups_its_rows_and_learns_each_of_them() -> None:
    rows = token_rows(32)
    batches = batches_of(rows, num_train_epochs=1)
    assert sorted(row for batch in batches for row in batch) == sorted(row["input_ids"] for row in rows)
    spread = sum(max(map(len, batch)) - min(map(len, batch)) for batch in batches)
    others = batches_of(rows, num_train_epochs=1, train_sampling_strategy="random")
    assert spread < 0.5 * sum(max(map(len, batch)) - min(map(len, batch)) for batch in others)
    assert batches == batches_of(rows, num_train_epochs=1) != batches_of(rows, num_train_epochs=1, seed=6)


def test_a_field_switches_it_off() -> None:
    rows = token_rows(12)
    in_turn = batches_of(rows, num_train_epochs=1, train_sampling_strategy="sequential")
    assert [row for batch in in_turn for row in batch] == [row["input_ids"] for row in rows]
    assert wants_groups({}) and wants_groups({"train_sampling_strategy": "group_by_length"})
    assert not wants_groups({"train_sampling_strategy": "random"})


def test_a_trainer_with_an_order_of_its_own_keeps_it() -> None:
    class InTurn(Trainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = token_rows(12)
    batches = batches_of(rows, num_train_epochs=1, trainer_class=InTurn)
    assert [row for batch in batches for row in batch] == [row["input_ids"] for row in rows]


@pytest.mark.parametrize("rows", [token_rows(4), [{"input_ids": [1, 2, 3]}] * 12])
def test_where_nothing_is_saved_the_order_is_the_trainers(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none")
    trainer = Trainer(trainable(), arguments, train_dataset=TokenizedRows(rows))
    group_rows(trainer, wanted=True)
    assert not isinstance(trainer._get_train_sampler(), GroupedByLength)


def test_a_run_resumed_in_its_second_epoch_goes_on_with_the_same_rows(tmp_path: Path) -> None:
    rows = token_rows(16)
    given: dict[str, Any] = GIVEN | {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 6}
    whole, resumed = trainable(lora_dropout=0.1), trainable(lora_dropout=0.1)
    first = train(whole, rows, output_dir=str(tmp_path), **given)
    checkpoint = str(tmp_path / "checkpoint-6")
    second = train(resumed, rows, output_dir=str(tmp_path / "b"), resume_from_checkpoint=checkpoint, **given)
    assert first.steps == second.steps == 12 and first.loss == second.loss
    assert all(torch.equal(part, weights(resumed)[name]) for name, part in weights(whole).items())
