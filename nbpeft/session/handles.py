"""Handles on adapted models: which one is alive, and a new one where the last was dropped."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.model import PeftModel


def is_handle(thing: object) -> bool:
    """Whether something is an adapted model. Imports nothing."""
    models = sys.modules.get("nbpeft.model")
    return models is not None and isinstance(thing, models.PeftModel)


def is_module(thing: object) -> bool:
    """Whether something is a torch module. Imports nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(thing, torch.nn.Module)


def uncompiled(model: Any) -> Any:
    """The model behind ``torch.compile``, or the model itself."""
    return getattr(model, "_orig_mod", model)


def is_live(handle: PeftModel) -> bool:
    """Whether a handle is the one that owns its base model's adapters."""
    return handle.is_live


def handle_over(base: nn.Module) -> PeftModel | None:
    """A handle on a base model that carries adapters although no variable holds one; None for a bare one."""
    engine = sys.modules.get("nbpeft.engine.tree.model_tree")
    manager = engine.manager_of(base) if engine is not None else None
    if manager is None or not manager.alive or not manager.names:
        return None
    from nbpeft.model import PeftModel

    first = (manager.active or manager.names)[0]
    return PeftModel.for_task(manager.configs[first]).over(base, manager)


def rehandle(base: nn.Module) -> Callable[[], PeftModel | None]:
    """Return a function that makes a new handle as long as the base model exists."""
    reference = weakref.ref(base)

    def make() -> PeftModel | None:
        found = reference()
        return None if found is None else handle_over(found)

    return make
