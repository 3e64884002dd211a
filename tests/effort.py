"""How much the tests try: the one place that reads which run this is.

``tests/run.py`` sets ``NBPEFT_TESTS`` to the tier it runs, and each contains the one before:

- ``quick``, the default, also of a bare ``pytest``: what a change is checked with;
- ``all``: what is checked before a change is merged;
- ``long``: hours of fuzzing.

A test over more points than the quick run has time for asks here how many to try, and is then part
of every tier::

    @pytest.mark.drawn(40)  # 40 of its cases, all of them in --all
    @pytest.mark.parametrize("point", POINTS)
    def test_each(point): ...

    def test_all():
        for point in drawn(POINTS, quick=40): ...

    def test_fuzz():
        for number in range(effort(quick=200, full=2_000, long=10_000)):
            ...

``NBPEFT_TESTS_SEED`` (0) draws other points than the usual ones, which are the same in every run.
Tests over drawn points take seconds: those that take more are marked ``slow`` beside, and ``slice``
if the quick run has them nevertheless; ``long`` marks what only the long run has.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar, overload

TIERS = ("quick", "all", "long")
TIER = os.environ.get("NBPEFT_TESTS", "quick")
SEED = int(os.environ.get("NBPEFT_TESTS_SEED", "0"))

if TIER not in TIERS:
    raise ValueError(f"NBPEFT_TESTS={TIER!r:.60} is none of {', '.join(TIERS)}")

Point = TypeVar("Point")


@overload
def effort(quick: int = 200, *, full: int, long: int = 10_000) -> int: ...
@overload
def effort(quick: int = 200, *, full: None = None, long: int = 10_000) -> int | None: ...
def effort(quick: int = 200, *, full: int | None = None, long: int = 10_000) -> int | None:
    """How many points this run tries.

    Args:
        quick: in the quick run.
        full: with ``--all``; None is all of them, for points that can be counted.
        long: with ``--long``, at least; if ``full`` is None, all of them there too.

    Returns:
        The number, or None for all.
    """
    if TIER == "quick":
        return quick
    if TIER == "all" or full is None:
        return full
    return max(full, long)


def drawn(points: Sequence[Point], quick: int = 200, *, full: int | None = None, seed: int = 0) -> list[Point]:
    """All points in ``--all`` and ``--long``, and ``quick`` of them otherwise, in their order.

    With ``full``, only so many in ``--all``. The same in every process and every run, until
    ``NBPEFT_TESTS_SEED`` or ``seed`` is another.
    """
    number = effort(quick) if full is None else effort(quick, full=full, long=len(points))
    if number is None or number >= len(points):
        return list(points)
    chosen = random.Random(f"{SEED} {seed}").sample(range(len(points)), number)
    return [points[index] for index in sorted(chosen)]
