"""Blends: several adapters that act together with weights, for one block, on one thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nbpeft.engine.combination import check_weights
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.switch import NOTHING, Active


@contextmanager
def blended(manager: AdapterManager, weights: Mapping[str, float]) -> Iterator[None]:
    """Lets the weighted sum of adapters act for calls that this thread makes inside the block.

    The sum is exact, and nothing is allocated: each adapter runs with its own factor. What is
    active for other threads, and afterwards, stays. The scale of an adapter counts as it is set.

    Args:
        manager: of the model.
        weights: adapter -> weight; 0 leaves it out, a negative one subtracts.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterError: a weight is not finite.
        MergeError: adapters are merged.
    """
    check_weights(tuple(weights), tuple(weights.values()))
    manager.refuse_merged("blending")
    names = tuple(name for name, weight in weights.items() if weight)
    manager.require_reachable(*weights)
    with manager.supplied(names):
        manager.require(*names)
        scales = tuple(weights[name] * manager.scale(name) for name in names)
        with manager.switch.call(Active(names, scales) if names else NOTHING):
            yield
