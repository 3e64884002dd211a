"""The weights that adapters began with, for a training that starts anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbpeft.interrupts import HeldInterrupts

if TYPE_CHECKING:
    from nbpeft.session.registry import TrackedModel


def draw_anew(tracked: TrackedModel, name: str, *, seed: int) -> None:
    """Gives an adapter the weights it was made with; one that was loaded gets new ones, drawn from a seed.

    Its config, whether it is active and whether it trains stay as they are.

    Raises:
        MergeError: it is merged.
    """
    from nbpeft.training.random_states import drawing_from

    manager = tracked.manager
    config, scale = manager.configs[name], manager.scale(name)
    states = next((states for made, states in tracked.first_random.values() if made is config), None)
    with drawing_from(seed if states is None else states):
        put = manager.prepare(name, config, trainable=name not in manager.frozen, replace=True)
    with manager.transaction():
        put()
        manager.set_scale(name, scale)
    if states is not None:
        tracked.first_random[name] = (manager.configs[name], states)
    if name in tracked.requested:
        tracked.requested[name] = (manager.configs[name], tracked.requested[name][1])


@contextmanager
def weights_kept_unless(tracked: TrackedModel, names: Iterable[str], learned: Callable[[], bool]) -> Iterator[None]:
    """Gives adapters back the weights they had when the block fails before anything was learned.

    Args:
        tracked: their model.
        names: those whose weights the block replaces.
        learned: whether a step was done.
    """
    import torch

    manager = tracked.manager
    before = {name: [part.detach().clone() for part in manager.parameters(name)] for name in names}
    try:
        yield
    except BaseException:
        if not learned():
            with HeldInterrupts(to_the_end=True), torch.no_grad():
                for name, tensors in before.items():
                    present: list[Any] = manager.parameters(name)
                    for part, value in zip(present, tensors, strict=True):
                        part.copy_(value)
        raise
