"""Time of a training on short rows: peft and transformers' Trainer with padding, beside packed and grouped rows."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
import transformers

from nbpeft.training import train
from nbpeft.training.data import Collator, TokenizedRows
from tests.benchmarks.harness import PEFT, Measure, Row, Size, library

ROW_COUNT, SHORTEST, LONGEST, BATCH, PACKED = 48, 24, 160, 8, 256
GIVEN: dict[str, Any] = {"num_train_epochs": 1, "learning_rate": 1e-4, "seed": 1}


def smollm2(size: Size) -> Any:
    """Four layers of SmolLM2-135M's shape, with its vocabulary; smaller where the size is that of a toy."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=4 if size.repeats else 1,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152 if size.repeats else 64,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def short_rows(size: Size) -> tuple[TokenizedRows, int]:
    """Rows with the answer in their last quarter, and how many tokens are learned."""
    generator = torch.Generator().manual_seed(0)
    count = ROW_COUNT if size.repeats else 4
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    labels = [[-100] * (3 * len(row) // 4) + row[3 * len(row) // 4 :] for row in rows]
    learned = sum(label != -100 for row in labels for label in row)
    return TokenizedRows([{"input_ids": row, "labels": ids} for row, ids in zip(rows, labels, strict=True)]), learned


def adapted(name: str, size: Size) -> Any:
    """The model with a LoRA adapter on all linear layers."""
    source = library(name)
    return source.get_peft_model(smollm2(size), source.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def epoch(**ours: Any) -> Any:
    """CPU seconds per learned token of an epoch: ours, or of peft with a Trainer that pads rows in random order."""

    def prepare(name: str, size: Size) -> Measure:
        model, (rows, learned) = adapted(name, size), short_rows(size)

        def work() -> None:
            if name != PEFT:
                train(model.train(), rows, **GIVEN, **ours)
                return
            with tempfile.TemporaryDirectory() as folder:
                arguments = transformers.TrainingArguments(
                    folder,
                    per_device_train_batch_size=BATCH,
                    report_to="none",
                    save_strategy="no",
                    use_cpu=not torch.cuda.is_available(),
                    disable_tqdm=True,
                    **GIVEN,
                )
                trainer = transformers.Trainer(model.train(), arguments, train_dataset=rows, data_collator=Collator())
                trainer.remove_callback(transformers.PrinterCallback)
                trainer.train()

        def once() -> float:
            begun = time.process_time()
            work()
            return (time.process_time() - begun) / learned

        return once

    return prepare


TITLE = f"training, a learned token, rows of {SHORTEST} to {LONGEST} tokens"
PACKING = {"packing": True, "max_length": PACKED, "per_device_train_batch_size": 3}
ROWS = [
    Row("train-packed", f"{TITLE}, packed", "seconds", 0.6, epoch(**PACKING), repeats=3),
    Row("train-grouped", f"{TITLE}, by length", "seconds", 0.8, epoch(per_device_train_batch_size=BATCH), repeats=3),
]
