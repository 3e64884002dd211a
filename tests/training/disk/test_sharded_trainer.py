"""What a Trainer of transformers saves of a model that is sharded over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbpeft.training.disk import sharded_trainer
from tests.training.support import trainable
from tests.training.transformers.test_trainer import trainer_for


def test_a_new_folder_is_made_for_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = trainer_for(trainable(), tmp_path)
    monkeypatch.setattr(sharded_trainer, "is_sharded", lambda model: True)
    trainer.save_model(str(tmp_path / "new" / "out"))
    assert {"adapter_model.safetensors", "adapter_config.json", "training_args.bin"} <= {
        path.name for path in (tmp_path / "new" / "out").iterdir()
    }
