"""What a training costs on a card: ``nbpeft.train`` beside ``peft`` in transformers' Trainer, on the same rows."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import nbpeft
from nbpeft.memory.devices import mark_peak, peak
from nbpeft.training import Collator
from tests.gpu.card import finish

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TOY = SMOLLM2 | {"hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}


@dataclass(frozen=True)
class Work:
    """One training.

    Attributes:
        title: for a person.
        shape: of the model, a Llama with random weights.
        batch: rows of a step.
        length: tokens of a row.
        learned: share of them that the loss is on.
        checkpointing: compute layers again in backward.
    """

    title: str
    shape: dict[str, Any]
    batch: int
    length: int
    learned: float = 1.0
    checkpointing: bool = False


WORKS = (
    Work("SmolLM2's shape, 16 x 160, loss on a quarter", SMOLLM2, 16, 160, 0.25),
    Work("SmolLM2's shape, 8 x 1024, loss on all", SMOLLM2, 8, 1024),
    Work("SmolLM2's shape, 8 x 1024, checkpointing", SMOLLM2, 8, 1024, checkpointing=True),
)
SHORT = (Work("a toy, 2 x 16, loss on a quarter", TOY, 2, 16, 0.25),)


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and the most bytes that the card held; None where that is not counted."""

    seconds: float
    peak: int | None


class Clock(TrainerCallback):
    """Notes when each step ends, and the peak from the second one on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        finish(self.device)
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            mark_peak(self.device)


def cost_of(library: str, work: Work, device: torch.device, steps: int) -> Cost:
    """Trains some steps with one of the libraries."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type != "cpu" else torch.float32
    model = LlamaForCausalLM(LlamaConfig(**work.shape)).to(device, dtype)
    rows = _rows(work, steps)
    clock = Clock(device)
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": work.batch,
        "gradient_checkpointing": work.checkpointing,
        "learning_rate": 1e-4,
        "optim": "adamw_torch",
    }
    if library == "nbpeft":
        ours: Any = nbpeft.get_peft_model(model, nbpeft.LoraConfig(r=16, target_modules="all-linear"))
        nbpeft.train(ours, rows, callbacks=[clock], **arguments)
    else:
        import peft

        theirs: Any = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
        with tempfile.TemporaryDirectory() as folder:
            quiet: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
            settings = TrainingArguments(output_dir=folder, use_cpu=device.type == "cpu", **quiet, **arguments)
            collator = Collator(pad_token_id=0, copy_labels=True)
            trainer = Trainer(theirs, settings, data_collator=collator, train_dataset=rows, callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    highest = peak(device)
    del model
    gc.collect()
    return Cost(statistics.median(b - a for a, b in zip(clock.times, clock.times[1:], strict=False)), highest)


def _rows(work: Work, steps: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    shape = (work.batch * steps, work.length)
    ids = torch.randint(0, work.shape["vocab_size"], shape, generator=generator).tolist()
    silent = int(work.length * (1 - work.learned))
    return [{"input_ids": row, "labels": [-100] * silent + row[silent:]} for row in ids]
