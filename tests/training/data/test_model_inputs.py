"""Rows that are the inputs of a model, such as pixel values, train as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import nbpeft
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.training.data.split import hash_of
from tests.closeness import assert_close

SIZE = 6
FIELDS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
}


def seeing() -> Any:
    """A tiny classifier of pictures."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=SIZE, patch_size=2, num_labels=3, **shape)
    return ViTForImageClassification(config)


def adapted() -> Any:
    config = nbpeft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return nbpeft.get_peft_model(seeing(), config)


def pictures(**more: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(12, 3, SIZE, SIZE, generator=generator)
    return [{"pixel_values": picture, "labels": number % 3, **more} for number, picture in enumerate(drawn)]


def losses(result: Any) -> list[float]:
    return [loss for _, loss in result.state.history]


def stacked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    values = {name: [torch.as_tensor(row[name]) for row in rows] for name in ("pixel_values", "labels")}
    return {name: torch.stack(parts) for name, parts in values.items()}


def test_they_have_the_losses_of_transformers_trainer(tmp_path: Path) -> None:
    settings = TrainingArguments(output_dir=str(tmp_path), **FIELDS, report_to="none", disable_tqdm=True)
    rows: Any = pictures()
    trainer = Trainer(adapted(), settings, train_dataset=rows)
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert_close(losses(nbpeft.train(adapted(), pictures(), **FIELDS)), expected)


def test_columns_that_are_no_inputs_are_named_and_left_out() -> None:
    plain = losses(nbpeft.train(adapted(), pictures(), **FIELDS))
    named = [{**row, "pixel_values": row["pixel_values"].numpy(), "file": "a.png"} for row in pictures()]
    for rows in (named, Dataset.from_list(named)):
        result = nbpeft.train(adapted(), rows, **FIELDS)
        assert "columns not used: 'file'" in result.state.message
        assert_close(losses(result), plain)


def test_rows_are_held_out_and_none_is_taken_for_a_repeat() -> None:
    result = nbpeft.train(adapted(), pictures(), eval_data=4, **FIELDS)
    assert "4 of 12 rows held out" in result.state.message and "also trained on" not in result.state.message
    twice = [*pictures(), *pictures()]
    assert "also trained on" in nbpeft.train(adapted(), twice, eval_data=4, **FIELDS).state.message


def test_a_collator_takes_rows_of_any_form() -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return stacked([{"pixel_values": row["picture"][0], "labels": row["kind"]} for row in rows])

    rows = [{"picture": [row["pixel_values"]], "kind": row["labels"]} for row in pictures()]
    found = losses(nbpeft.train(adapted(), rows, data_collator=collate, **FIELDS))
    assert_close(found, losses(nbpeft.train(adapted(), pictures(), **FIELDS)))


def test_pictures_of_several_sizes_are_refused_with_a_way_out() -> None:
    rows = pictures()
    rows[1]["pixel_values"] = torch.randn(3, 4, SIZE)
    with pytest.raises(
        TrainingError, match=r"'pixel_values' of the shapes '\(3, 6, 6\)', '\(3, 4, 6\)'; give them one"
    ):
        nbpeft.train(adapted(), rows, **FIELDS)


@pytest.mark.parametrize("columns", [("pixel_values",), ("text", "label")])
def test_rows_without_the_inputs_are_told_which(columns: tuple[str, ...]) -> None:
    values = {"pixel_values": torch.zeros(3, SIZE, SIZE), "text": "a cat", "label": 1}
    with pytest.raises(TrainingError, match="it needs rows with 'pixel_values', 'labels'; found"):
        nbpeft.train(adapted(), [{name: values[name] for name in columns}] * 4, **FIELDS)


def test_options_for_texts_are_refused() -> None:
    for options, words in (({"max_length": 5}, "max_length has no effect"), ({"long": "drop"}, "long has no effect")):
        with pytest.raises(ConfigError, match=words):
            nbpeft.train(adapted(), pictures(), **options, **FIELDS)
    with pytest.raises(TrainingError, match="Expected columns prompt and completion"):
        nbpeft.train(adapted(), pictures(), columns={"prompt": "labels"}, **FIELDS)
    renamed = [{"pixel_values": row["pixel_values"], "kind": row["labels"]} for row in pictures()]
    found = nbpeft.train(adapted(), renamed, columns={"labels": "kind"}, **FIELDS)
    assert_close(losses(found), losses(nbpeft.train(adapted(), pictures(), **FIELDS)))


def test_the_preview_names_dtype_and_shape() -> None:
    result = nbpeft.get_session().data([{**row, "name": "x"} for row in pictures()], model=adapted())
    assert str(result).startswith("data (inputs of the model): 12 rows\nnote: columns not used: 'name'")
    spans = [span.text for row in result.summary.rows for span in row.spans]
    assert spans[1] == "pixel_values: float32 3 × 6 × 6, labels: 1"


def test_pictures_in_bfloat16_are_previewed_and_told_apart_by_their_middle() -> None:
    rows = [{"pixel_values": torch.zeros(3, 64, 64, dtype=torch.bfloat16), "labels": 0} for _ in range(2)]
    rows[1]["pixel_values"][0, 32, 32] = 1
    assert hash_of(rows[0]) != hash_of(rows[1])
    result = nbpeft.get_session().data(rows, model=adapted())
    assert [span.text for span in result.summary.rows[0].spans] == ["pixel_values: bfloat16 3 × 64 × 64, labels: 0"]
    assert result.summary.repeated == 0


def test_a_run_knows_its_pictures_by_their_content() -> None:
    from nbpeft.training.monitor.run_checkpointer import mark_of_rows

    first, again, other = pictures(), pictures(), pictures()
    other[5]["pixel_values"] = other[5]["pixel_values"].clone()
    other[5]["pixel_values"][0, 0, 0] += 1
    assert mark_of_rows(first) == mark_of_rows(again) != mark_of_rows(other)
    lists = [{**row, "pixel_values": np.asarray(row["pixel_values"]).tolist()} for row in first]
    assert mark_of_rows(lists)["rows"] == 12
