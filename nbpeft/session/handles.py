"""The PeftModels of adapted models: which one is live, and creating a new one if the last was deleted."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.model import PeftModel


def is_handle(thing: object) -> bool:
    """Returns whether an object is a PeftModel. Imports nothing."""
    models = sys.modules.get("nbpeft.model")
    return models is not None and isinstance(thing, models.PeftModel)


def is_module(thing: object) -> bool:
    """Returns whether an object is a torch module. Imports nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(thing, torch.nn.Module)


def uncompiled(model: Any) -> Any:
    """Returns the model inside a ``torch.compile`` wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)


def handle_over(base: nn.Module) -> PeftModel | None:
    """Creates a PeftModel for a base model with adapters that has none; returns None for a bare model."""
    engine = sys.modules.get("nbpeft.engine.tree.model_tree")
    manager = engine.manager_of(base) if engine is not None else None
    if manager is None or not manager.alive or not manager.names:
        return None
    from nbpeft.model import PeftModel

    first = (manager.active or manager.names)[0]
    return PeftModel.for_task(manager.configs[first]).over(base, manager)


def rehandle(base: nn.Module) -> Callable[[], PeftModel | None]:
    """Return a function that creates a new PeftModel as long as the base model exists."""
    reference = weakref.ref(base)

    def create() -> PeftModel | None:
        existing = reference()
        return None if existing is None else handle_over(existing)

    return create
