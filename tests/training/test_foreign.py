"""A tutorial's Trainer, imported from transformers or derived from it, with a model of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import TrainingArguments

import nbpeft
from nbpeft.training import Collator
from nbpeft.training.foreign import watch_trainers
from nbpeft.training.trainer import AdapterTrainerMixin
from tests.training.support import adapt, tiny_base, token_rows, weights

watch_trainers()


def trainer_of(cls: Any, model: Any, folder: Path, **fields: Any) -> Any:
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "report_to": "none", "use_cpu": True}
    options = {"disable_tqdm": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 4}
    arguments = TrainingArguments(str(folder), **(settings | options | fields))
    collator = Collator(copy_labels=True)
    return cls(model=model, args=arguments, train_dataset=token_rows(), data_collator=collator)


class Derived(transformers.Trainer):
    """A Trainer of another library."""

    def __init__(self, model: Any = None, **options: Any) -> None:
        self.seen = type(self).__name__
        super().__init__(model, **options)


@pytest.mark.parametrize("cls", [transformers.Trainer, Derived])
def test_checkpoints_hold_adapters_where_weights_are_tied(cls: Any, tmp_path: Path) -> None:
    model = adapt(tiny_base(tie_word_embeddings=True), task_type="CAUSAL_LM")
    trainer = trainer_of(cls, model, tmp_path)
    assert isinstance(trainer, (cls, AdapterTrainerMixin))
    trainer.train()
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files
    loaded = peft.PeftModel.from_pretrained(tiny_base(tie_word_embeddings=True), tmp_path / "checkpoint-4")
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    through = adapt(tiny_base(), task_type="CAUSAL_LM")
    trainer_of(transformers.Trainer, through, tmp_path / "one").train()
    resumed = adapt(tiny_base(), task_type="CAUSAL_LM")
    trainer_of(transformers.Trainer, resumed, tmp_path / "one").train(
        resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2")
    )
    for name, weight in weights(through).items():
        assert torch.equal(weights(resumed)[name], weight), name


def test_without_a_task_type_the_columns_of_the_base_are_kept_and_the_loss_is_evaluated(tmp_path: Path) -> None:
    trainer = trainer_of(transformers.Trainer, adapt(tiny_base()), tmp_path)
    trainer.train()
    assert trainer.evaluate(token_rows(8))["eval_loss"] > 0
    assert {"input_ids", "position_ids", "labels"} <= set(trainer._signature_columns)


def test_a_base_that_calls_itself_quantized_is_accepted(tmp_path: Path) -> None:
    base = tiny_base()
    base.is_quantized = True
    base.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_qat_trainable": False})()
    trainer_of(transformers.Trainer, adapt(base), tmp_path, save_strategy="no").train()


def test_other_models_get_the_trainer_they_asked_for(tmp_path: Path) -> None:
    plain = trainer_of(transformers.Trainer, tiny_base(), tmp_path)
    theirs = peft.get_peft_model(tiny_base(), peft.LoraConfig(target_modules=["q_proj"]))
    assert type(plain) is transformers.Trainer
    assert type(trainer_of(transformers.Trainer, theirs, tmp_path)) is transformers.Trainer
    assert type(trainer_of(nbpeft.Trainer, adapt(tiny_base()), tmp_path)) is nbpeft.Trainer


LATER = """
import json, sys
import nbpeft
names = nbpeft.LoraConfig, nbpeft.get_peft_model
early = "transformers.trainer" in sys.modules
waiting = sum(type(finder).__module__.startswith("nbpeft") for finder in sys.meta_path)
from nbpeft import PeftModel
from transformers import Trainer
left = sum(type(finder).__module__.startswith("nbpeft") for finder in sys.meta_path)
print(json.dumps([early, waiting, left, hasattr(Trainer.__init__, "_takes_adapters")]))
"""


def test_a_trainer_that_is_imported_later_is_found(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == [False, 1, 0, True]
