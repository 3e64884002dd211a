"""The pause of the garbage collector while modules are created."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from nbpeft.engine.injection.build import _MANY_OBJECTS, CollectionPaused


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The collector is on, nothing is frozen, and few objects are young."""
    gc.enable()
    gc.unfreeze()
    gc.collect()
    yield
    gc.enable()
    gc.unfreeze()


def is_old(one: object) -> bool:
    return any(other is one for other in gc.get_objects(generation=2))


def test_many_new_objects_are_not_visited_by_the_next_collections() -> None:
    with CollectionPaused():
        assert not gc.isenabled()
        created = [[] for _ in range(_MANY_OBJECTS)]  # type: ignore[var-annotated]
    assert gc.isenabled() and not gc.get_freeze_count()
    assert gc.get_count()[0] < _MANY_OBJECTS // 10 and is_old(created[-1])


def test_few_new_objects_stay_young() -> None:
    with CollectionPaused():
        created = [[] for _ in range(_MANY_OBJECTS // 100)]  # type: ignore[var-annotated]
    assert gc.isenabled() and not is_old(created[-1])


def test_what_the_program_has_frozen_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with CollectionPaused():
        created = [[] for _ in range(_MANY_OBJECTS)]  # type: ignore[var-annotated]
    assert gc.get_freeze_count() >= frozen - len(created) > 0


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    with CollectionPaused():
        pass
    assert not gc.isenabled()
