"""Training of adapters: Trainer integration, tracking of people's own loops, data, optimizers.

Knows no notebook. Names are resolved when they are first used, so that tracking a loop does not
import transformers' Trainer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nbpeft.logs import collapsed

if TYPE_CHECKING:
    from nbpeft.engine.methods.lora.optimizers import (
        LoraFAOptimizer,
        create_lorafa_optimizer,
        create_loraplus_optimizer,
    )
    from nbpeft.training.callback import RunCallback
    from nbpeft.training.control import RunControl
    from nbpeft.training.data import Collator, is_plain, prepare_data
    from nbpeft.training.fit import train
    from nbpeft.training.patching import patch_trainer, unpatch_trainer
    from nbpeft.training.prepare import prepare_model_for_kbit_training
    from nbpeft.training.result import TrainResult
    from nbpeft.training.run import Run, track
    from nbpeft.training.script import export_script
    from nbpeft.training.trainer import Trainer, adapter_trainer

__all__ = [
    "Collator",
    "LoraFAOptimizer",
    "Run",
    "RunCallback",
    "RunControl",
    "TrainResult",
    "Trainer",
    "adapter_trainer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "export_script",
    "is_plain",
    "patch_trainer",
    "prepare_data",
    "prepare_model_for_kbit_training",
    "track",
    "train",
    "unpatch_trainer",
]

_LORA = "nbpeft.engine.methods.lora.optimizers"
_HOMES = {
    "Collator": "data",
    "LoraFAOptimizer": _LORA,
    "Run": "run",
    "RunCallback": "callback",
    "RunControl": "control",
    "TrainResult": "result",
    "Trainer": "trainer",
    "adapter_trainer": "trainer",
    "create_lorafa_optimizer": _LORA,
    "create_loraplus_optimizer": _LORA,
    "export_script": "script",
    "is_plain": "data",
    "patch_trainer": "patching",
    "prepare_data": "data",
    "prepare_model_for_kbit_training": "prepare",
    "track": "run",
    "train": "fit",
    "unpatch_trainer": "patching",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        # transformers' Trainer imports bitsandbytes, which says on import what it does without.
        with collapsed():
            home = _HOMES[name]
            return getattr(importlib.import_module(home if "." in home else f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
