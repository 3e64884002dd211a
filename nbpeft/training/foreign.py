"""transformers' own Trainer, and Trainers derived from it, take our models as they take those of PEFT.

transformers knows models with adapters by their class, which is one of the ``peft`` package. For
any other class its Trainer writes whole state dicts as checkpoints (and fails at that where weights
are tied) and refuses quantized bases. So its constructor, when it is given one of our models and
only then, makes the Trainer one of :func:`nbpeft.adapter_trainer`.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HOME = "transformers.trainer"


def watch_trainers() -> None:
    """From now on Trainers take our models, whether transformers' is imported already or later."""
    trainer_class = getattr(sys.modules.get(_HOME), "Trainer", None)
    if trainer_class is not None:
        _teach(trainer_class)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Teaches the Trainer when its module is imported; finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _HOME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def execute_and_teach(module: ModuleType) -> None:
                execute(module)
                _teach(module.Trainer)

            loader.exec_module = execute_and_teach
        return spec


def _teach(trainer_class: Any) -> None:
    original = trainer_class.__init__
    if getattr(original, "_takes_adapters", False):
        return

    @functools.wraps(original)
    def initialize(self: Any, model: Any = None, *args: Any, **kwargs: Any) -> None:
        if not _is_ours(model):
            original(self, model, *args, **kwargs)
            return
        from nbpeft.training.trainer import AdapterTrainerMixin, adapter_trainer

        foreign = not isinstance(self, AdapterTrainerMixin)
        if foreign:
            self.__class__ = adapter_trainer(type(self))
        original(self, model, *args, **kwargs)
        if foreign:
            self.read_adapted_model()

    initialize._takes_adapters = True  # type: ignore[attr-defined]
    trainer_class.__init__ = initialize


def _is_ours(model: Any) -> bool:
    models = sys.modules.get("nbpeft.model")
    return models is not None and isinstance(model, models.PeftModel)
