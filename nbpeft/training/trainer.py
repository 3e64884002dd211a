"""``nbpeft.Trainer``: transformers' Trainer, which knows adapters once it is patched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import transformers

from nbpeft.engine.selective_recompute import selective_recompute
from nbpeft.errors import ConfigError
from nbpeft.training.trainer_patch import patch_trainer


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` for models with adapters, with the same arguments.

    A checkpoint folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` beside the
    Trainer's own files; adapters that are not called ``default`` lie in subfolders of their name.
    ``resume_from_checkpoint``, ``load_best_model_at_end`` and ``save_model`` work on adapters
    alone, and quantized bases are accepted. It calls ``nbpeft.patch_trainer()``.

    Args:
        *args: of ``transformers.Trainer``.
        recompute: whether activations and norms are computed again in backward instead of being kept, as
            ``nbpeft.selective_recompute`` does; compiled and data-parallel models keep them.
        **kwargs: of ``transformers.Trainer``.

    Raises:
        ConfigError: ``recompute`` is neither True nor False.
    """

    def __init__(self, *args: Any, recompute: bool = True, **kwargs: Any) -> None:
        patch_trainer()
        if not isinstance(recompute, bool):
            raise ConfigError(f"recompute must be True or False, not {recompute!r:.60}", field="recompute")
        self.recompute = recompute
        super().__init__(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._recomputing():
            return super()._inner_training_loop(*args, **kwargs)

    def _recomputing(self) -> AbstractContextManager[Any]:
        if not self.recompute or self.args.torch_compile or self.args.n_gpu > 1 or self.model is None:
            return nullcontext()
        return selective_recompute(self.model)


def adapter_trainer(trainer_class: type[Any]) -> type[Any]:
    """The given Trainer class, which knows adapters from here on; for Trainers of other libraries.

    It is the class itself: ``nbpeft.patch_trainer()`` has changed ``transformers.Trainer`` below it.

    Args:
        trainer_class: A subclass of ``transformers.Trainer``.
    """
    patch_trainer()
    return trainer_class
