"""Whether two results are equal up to rounding: the one place that says how near is near.

A processor, a number of threads or a release of torch decides in which order a sum is added and whether a
product is rounded before it is. So two ways to one result differ, and by how much follows from three things:

- the **precision**: one rounding moves a number by at most half an ``eps`` of its dtype. Kernels for float16
  and bfloat16 add in float32, and round once at the end of a product;
- the **length of the sums**: a product of matrices rounds once for each term, and products one after another
  (``depth``) hand their errors on. Roundings are as often up as down, so ``n`` of them come to ``√n`` of one;
- the **size of the values**: errors are a share of the largest value of the tensor, as each of its numbers is
  a sum of terms of that size. A difference of two large numbers has their errors: ``scale`` says how large.

So the bound is ``SAFETY · eps · √(terms · depth) · scale``. ``SAFETY`` is 8: 2 for two results with errors of
their own and for the largest of many; 4 so that what is right uses a quarter of its bound, which
``python -m tests.margins`` checks over kernels, threads and seeds. The bound never comes from a run.

Comparisons that are not of one quantity (an estimate from samples, weights with 4 bits) have an error by
design, many times that of rounding: :func:`assert_approximates` takes its size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SAFETY = 8
# The tiny models of the tests: sums of up to 64 terms, and in two decoder layers 16 products one after another
# (query, scores, values, output, gate, down; and the head).
TERMS = 64
DEPTH = 16
SMALLEST_SUM = torch.finfo(torch.float32).eps  # of what is added in float32, whatever the result's dtype
# For ``assert_approximates``: a rounding turns a singular vector by itself over the gap to the next singular value,
# and a random weight has gaps of a thousandth.
SINGULAR_VECTORS = 0.01

# Set by ``tests.margins``: called with the share of the bound that each comparison used.
record: Callable[[str, float], None] | None = None


def bound(dtype: torch.dtype, scale: float, terms: int = TERMS, depth: int = DEPTH) -> float:
    """The largest difference that rounding explains.

    Args:
        dtype: in which both were computed; the coarser one.
        scale: size of the values.
        terms: length of the sums.
        depth: number of products one after another.

    Returns:
        An absolute difference; 0 for integers.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    eps = torch.finfo(dtype).eps
    of_sums = min(eps, SMALLEST_SUM) * math.sqrt(terms * depth)
    of_results = eps * math.sqrt(depth)
    return SAFETY * max(of_sums, of_results) * scale


def assert_close(
    actual: Any,
    expected: Any,
    *,
    terms: int = TERMS,
    depth: int = DEPTH,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    equal_nan: bool = False,
    message: object = "",
) -> None:
    """Fails unless both are one result up to rounding, computed in whatever order.

    Args:
        actual: a tensor, a number, or a list, tuple or dictionary of them, nested or not.
        expected: the same, with shapes and dtypes of ``actual``; each tensor is compared by itself.
        terms: length of the sums: columns of the matrix, or tokens that a gradient is summed over.
        depth: products one after another: 1 for one layer, 7 for each layer of a decoder, three times as many
            for gradients, and so many for each step of a training.
        scale: size of the values that were added, where it is not that of the result: before a subtraction,
            or where zeros are expected.
        dtype: what both were computed in, where they are not in it any more. Python's numbers are taken for
            results of float32.
        equal_nan: whether NaN equals NaN.
        message: what was compared, for the report of a failure.

    Raises:
        AssertionError: they differ by more, or in shape, dtype or structure.
    """
    __tracebackhide__ = True
    for path, one, other in _pairs(actual, expected, ""):
        where = " ".join(filter(None, [str(message), path]))
        assert one.shape == other.shape, f"{where}: the shape is {tuple(one.shape)} and not {tuple(other.shape)}"
        assert one.dtype == other.dtype, f"{where}: the dtype is {one.dtype} and not {other.dtype}"
        error, allowed, size = _measure(one, other, terms, depth, scale, dtype, equal_nan)
        _note("close", error, allowed)
        assert error <= allowed, (
            f"{where}: differs by {error:.3g} where rounding explains {allowed:.3g} "
            f"({terms} terms, depth {depth}, {dtype or other.dtype}, values up to {size:.3g})"
        )


def is_close(
    actual: Any,
    expected: Any,
    *,
    terms: int = TERMS,
    depth: int = DEPTH,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    equal_nan: bool = False,
) -> bool:
    """Whether both are one result up to rounding, where either answer is right: see :func:`assert_close`."""
    return all(
        one.shape == other.shape and error <= allowed
        for _, one, other in _pairs(actual, expected, "")
        for error, allowed, _ in [_measure(one, other, terms, depth, scale, dtype, equal_nan)]
    )


def differ(
    actual: Tensor, expected: Tensor, *, terms: int = TERMS, depth: int = DEPTH, dtype: torch.dtype | None = None
) -> bool:
    """Whether two tensors differ by more than rounding explains, four times over: one is not the other."""
    error, allowed, _ = _measure(actual.detach(), expected.detach(), terms, depth, None, dtype, True)
    _note("differ", allowed, error)
    return error > 4 * allowed


def assert_approximates(
    actual: Any, expected: Any, error: float, *, scale: float | None = None, message: object = ""
) -> None:
    """Fails unless one result stands for another that is computed otherwise on purpose.

    For what is not equal but for rounding: weights that are quantized on the way, estimates from samples,
    series cut short, a solver that ends before it is exact. ``error`` is what the approximation allows.

    Args:
        actual: as in :func:`assert_close`.
        expected: the same.
        error: largest difference, as a share of ``scale``.
        scale: size of the values; that of ``expected`` if it is not given.
        message: what was compared, for the report of a failure.

    Raises:
        AssertionError: they differ by more, or in shape or structure.
    """
    __tracebackhide__ = True
    for path, one, other in _pairs(actual, expected, ""):
        where = " ".join(filter(None, [str(message), path]))
        assert one.shape == other.shape, f"{where}: the shape is {tuple(one.shape)} and not {tuple(other.shape)}"
        found, _, size = _measure(one, other, 1, 1, scale, None, True)
        _note("approximates", found, error * size)
        assert found <= error * size, f"{where}: differs by {found:.3g} where {error} of {size:.3g} is allowed"


def assert_same(actual: Any, expected: Any, message: object = "") -> None:
    """Fails unless both are equal bit by bit.

    May be asked for only where the same operations run on the same kernels in the same order: weights that
    are copied, moved, saved and loaded again; a result computed twice from equal tensors of equal shapes,
    strides and dtypes with equal numbers of threads; numbers that are exact in their dtype. Not for a product
    with other shapes (a row alone or in a batch, a vocabulary made larger), another layout (a transposed or a
    sliced weight), another association (``(x A) B`` and ``x (A B)``), a compiled model, or PEFT's way.

    Args:
        actual: as in :func:`assert_close`.
        expected: the same.
        message: what was compared, for the report of a failure.

    Raises:
        AssertionError: a bit, a shape, a dtype or the structure differs.
    """
    __tracebackhide__ = True
    for path, one, other in _pairs(actual, expected, ""):
        where = " ".join(filter(None, [str(message), path]))
        assert one.dtype == other.dtype, f"{where}: the dtype is {one.dtype} and not {other.dtype}"
        assert torch.equal(one, other), f"{where}: the two are not equal bit by bit"


def _pairs(actual: Any, expected: Any, path: str) -> list[tuple[str, Tensor, Tensor]]:
    """The tensors of two structures that must be alike, with the place of each."""
    __tracebackhide__ = True
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping) and actual.keys() == expected.keys(), (
            f"{path}: the keys differ: {set(actual) ^ set(expected)}"
        )
        return [pair for key in expected for pair in _pairs(actual[key], expected[key], f"{path}[{key!r}]")]
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        assert isinstance(actual, Sequence) and len(actual) == len(expected), f"{path}: not {len(expected)} values"
        return [
            pair
            for index, parts in enumerate(zip(actual, expected, strict=True))
            for pair in _pairs(*parts, f"{path}[{index}]")
        ]
    one, other = (_tensor(value) for value in (actual, expected))
    return [(path, one, other)]


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (bool, int, float, complex)):
        return torch.tensor(value, dtype=torch.float32 if isinstance(value, (int, float)) else None)
    return torch.as_tensor(value)


def _measure(
    actual: Tensor,
    expected: Tensor,
    terms: int,
    depth: int,
    scale: float | None,
    dtype: torch.dtype | None,
    equal_nan: bool,
) -> tuple[float, float, float]:
    """The largest difference, the one that is allowed, and the size of the values."""
    exact = torch.complex128 if expected.dtype.is_complex or actual.dtype.is_complex else torch.float64
    coarser = dtype or max((actual.dtype, expected.dtype), key=_eps)
    one, other = actual.to("cpu", exact), expected.to("cpu", exact)
    same = (one == other) | (one.isnan() & other.isnan() if equal_nan else False)
    difference = torch.where(same, 0.0, (one - other).abs())
    error = float(difference.nan_to_num(math.inf, posinf=math.inf).max()) if difference.numel() else 0.0
    finite = other[other.isfinite()].abs()
    size = scale if scale is not None else float(finite.max()) if finite.numel() else 0.0
    return error, bound(coarser, size, terms, depth), size


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps) if dtype.is_floating_point or dtype.is_complex else 0.0


def _note(kind: str, used: float, allowed: float) -> None:
    """Hands the share of a bound to the recorder, with the place that asked."""
    if record is None or used == 0.0:
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    record(f"{place} {kind}", used / allowed if allowed else math.inf)
