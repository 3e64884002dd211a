"""``nbpeft.Trainer``: transformers' Trainer, which knows adapters once it is patched."""

from __future__ import annotations

from typing import Any

import transformers

from nbpeft.training.trainer_patch import patch_trainer


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` for models with adapters, with the same arguments.

    A checkpoint folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` beside the
    Trainer's own files; adapters that are not called ``default`` lie in subfolders of their name.
    ``resume_from_checkpoint``, ``load_best_model_at_end`` and ``save_model`` work on adapters
    alone, and quantized bases are accepted. It calls ``nbpeft.patch_trainer()``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        patch_trainer()
        super().__init__(*args, **kwargs)


def adapter_trainer(trainer_class: type[Any]) -> type[Any]:
    """The given Trainer class, which knows adapters from here on; for Trainers of other libraries.

    It is the class itself: ``nbpeft.patch_trainer()`` has changed ``transformers.Trainer`` below it.

    Args:
        trainer_class: A subclass of ``transformers.Trainer``.
    """
    patch_trainer()
    return trainer_class
