"""Leaves a model as it was found before a training, except for the weights that were trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nbpeft.engine.tree.model_tree import embedding_of
from nbpeft.memory.checkpointing import disable_checkpointing, is_checkpointing
from nbpeft.model.from_data.observing import modes_kept
from nbpeft.training.adapters.adapted_model import PREPARED, base_of

_OF_ACCELERATE = ("forward", "_original_forward", PREPARED)
"""What accelerate sets on a model."""


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Undoes what a Trainer leaves on a model: train mode, disabled cache, gradients, cast forward, hooks, a mark.

    After training, adapters are in the mode of their base, so that dropout is off in evaluation mode.
    """
    base: Any = base_of(model)
    embedding = embedding_of(base)
    watched = set() if embedding is None else set(embedding._forward_hooks)
    config = getattr(base, "config", None)
    cache = getattr(config, "use_cache", None)
    checkpoints = is_checkpointing(base)
    before = {name: vars(model)[name] for name in _OF_ACCELERATE if name in vars(model)}
    vars(model).pop(PREPARED, None)  # with the mark of another Trainer, accelerate would ignore bf16 and fp16
    try:
        with modes_kept(model):
            yield
        model.train(base.training)
    finally:
        model.zero_grad(set_to_none=True)
        if config is not None:
            config.use_cache = cache
        if not checkpoints and is_checkpointing(base):
            disable_checkpointing(base)
        if embedding is not None:  # transformers adds a hook per training with gradient checkpointing
            for hook in embedding._forward_hooks.keys() - watched:
                del embedding._forward_hooks[hook]
        for name in _OF_ACCELERATE:
            vars(model).pop(name, None)
        vars(model).update(before)
