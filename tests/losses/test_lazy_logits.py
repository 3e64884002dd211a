"""Logits whose data nobody needs are not computed; those that are needed are those of the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.losses import LazyLogits
from nbpeft.losses.lazy_logits import ChunkedHead
from tests.closeness import assert_close

SIZE = 7
ALL = slice(None)
HIDDEN = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(1))


def head(factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda hidden: F.linear(hidden, factor * WEIGHT)


def both(**parts: Any) -> tuple[LazyLogits, Tensor, ChunkedHead]:
    """Lazy logits, those of a head, and what the former were used for."""
    settings = ChunkedHead(chunk_size=4)
    return LazyLogits.of(HIDDEN, head(), SIZE, settings, **parts), head()(HIDDEN), settings


def check(found: Tensor, expected: Tensor, settings: ChunkedHead, *, lazy: bool) -> None:
    assert isinstance(found, LazyLogits) == lazy and (settings.needed_by == "") == lazy
    assert found.shape == expected.shape
    assert_close(found.sum(-1), expected.sum(-1))  # which needs the data


SELECTIONS: list[tuple[Any, bool]] = [
    *((index, True) for index in (0, -1, slice(1, 3), slice(None, None, 2), (ALL, 1), (ALL, slice(1, None)))),
    *((index, True) for index in (Ellipsis, (1, Ellipsis), (Ellipsis, ALL), (ALL, slice(1, None), ALL))),
    *((index, True) for index in ((ALL, ALL, slice(0, SIZE)), (2, 1), (2, 1, ALL), (Ellipsis, slice(0, None)))),
    *((index, False) for index in ((Ellipsis, 0), (ALL, ALL, 3), (2, 1, 0), (Ellipsis, slice(1, None)))),
    *((index, False) for index in ((ALL, ALL, slice(None, None, 2)), torch.tensor([0, 2]), None, (ALL, [0, 1]))),
]


@pytest.mark.parametrize(("index", "lazy"), SELECTIONS)
def test_a_selection_of_tokens_computes_nothing(index: Any, lazy: bool) -> None:
    logits, expected, settings = both()
    check(logits[index], expected[index], settings, lazy=lazy)


@pytest.mark.parametrize(
    ("reshape", "lazy"),
    [
        (lambda logits: logits.view(-1, SIZE), True),
        (lambda logits: logits.reshape(2, 2, 3, SIZE), True),
        (lambda logits: logits.flatten(0, 1), True),
        (lambda logits: logits.contiguous(), True),
        (lambda logits: logits.flatten(), False),
        (lambda logits: logits.reshape(SIZE, -1), False),
        (lambda logits: logits.flatten(1), False),
    ],
)
def test_another_shape_of_the_tokens_computes_nothing(reshape: Callable[[Tensor], Tensor], lazy: bool) -> None:
    logits, expected, settings = both()
    check(reshape(logits), reshape(expected), settings, lazy=lazy)


@pytest.mark.parametrize(
    ("rows", "factor"),
    [(slice(0, 1), 2.0), (slice(1, 4), 3.0), (slice(1, None), 3.0), (slice(-3, None), 3.0)],
)
def test_the_rows_of_one_adapter_have_its_head(rows: slice, factor: float) -> None:
    logits, _, settings = both(parts={(0, 1): head(2.0), (1, 4): head(3.0)})
    check(logits[rows], head(factor)(HIDDEN[rows]), settings, lazy=True)


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 4, 2), slice(None), 1, (slice(1, 4), ALL)])
def test_other_rows_are_those_of_the_whole_batch(rows: Any) -> None:
    logits, expected, settings = both(parts={(0, 1): head(2.0), (1, 4): head(3.0)})
    check(logits[rows], expected[rows], settings, lazy=False)
