"""What each of two processes under ZeRO runs: … torch.distributed.run … this.py FOLDER STAGE [CHECKPOINT]."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from nbpeft.training import Trainer
from tests.training.launch.test_launch import rows
from tests.training.support import trainable

ARGUMENTS: dict[str, Any] = {
    "max_steps": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_steps": 2,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
}


def run(folder: Path, stage: int, checkpoint: str | None = None) -> list[float]:
    """Trains a tiny model, whose adapter goes into ``folder/adapter``. Returns the losses.

    Args:
        folder: for checkpoints and the adapter.
        stage: of ZeRO; 0 without DeepSpeed.
        checkpoint: to go on from.
    """
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    zero |= {name: "auto" for name in sizes} | {"zero_force_ds_cpu_optimizer": False}
    own: dict[str, Any] = {"deepspeed": zero, "per_device_train_batch_size": 2} if stage else {}
    arguments = TrainingArguments(str(folder), **{"per_device_train_batch_size": 4} | ARGUMENTS | own)
    trainer = Trainer(model=trainable(lora_dropout=0.0), args=arguments, train_dataset=rows())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / "adapter"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    losses = run(place, int(sys.argv[2]), *sys.argv[3:])
    (place / "losses.json").write_text(json.dumps(losses))
