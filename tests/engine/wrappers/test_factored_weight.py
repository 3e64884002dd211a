"""A weight and thin products that are not multiplied out: what is computed with it is what the sum gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations import moe  # noqa: F401 - registers its fallback

from nbpeft.engine.wrappers.factored_weight import FactoredWeight, Product, grouped_product
from tests.closeness import assert_close, is_close

EXPERTS, ROWS, COLUMNS, RANK = 5, 8, 12, 2
OFFS = torch.tensor([3, 3, 7, 7, 9], dtype=torch.int32)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factored(*, count: int | None = EXPERTS, scale: Any = 0.5, dtype: torch.dtype = torch.float64) -> FactoredWeight:
    """A weight with two products, whose factors take gradients."""
    first = () if count is None else (count,)
    products = [
        Product(
            drawn(*first, ROWS, RANK, seed=seed).to(dtype).requires_grad_(),
            drawn(*first, RANK, COLUMNS, seed=seed + 1).to(dtype),
            scale,
        )
        for seed in (1, 3)
    ]
    return FactoredWeight(drawn(*first, ROWS, COLUMNS, seed=9).to(dtype), products)


def same(weight: FactoredWeight, compute: Callable[[Any], Tensor], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether something gives the same of a weight as of its sum, gradients too, and without summing up."""
    total = weight.summed()
    leaves = [product.left for product in weight.products]
    expected = compute(total)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    with monkeypatch.context() as patched:
        patched.delattr(FactoredWeight, "summed")
        found = compute(weight)
    gradients = torch.autograd.grad(found.square().sum(), leaves)
    pairs = zip((expected, *wanted), (found, *gradients), strict=True)
    return all(is_close(one, other) for one, other in pairs)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "compute",
    {
        "linear": lambda w: F.linear(drawn(4, COLUMNS), w[2], torch.ones(ROWS, dtype=torch.float64)),
        "index": lambda w: drawn(4, ROWS) @ w[torch.tensor(3)] + drawn(4, ROWS) @ w[3],
        "from the left": lambda w: w[0] @ drawn(COLUMNS, 2),
        "gathered": lambda w: torch.bmm(w[torch.tensor([0, 4, 4])], drawn(3, COLUMNS, 1)),
        "batched": lambda w: torch.bmm(drawn(EXPERTS, 2, ROWS), w),
        "matmul": lambda w: torch.matmul(drawn(EXPERTS, 2, COLUMNS), w.mT),
        "transposed": lambda w: drawn(4, COLUMNS) @ w[1].transpose(0, 1),
        "sizes": lambda w: w[0].transpose(0, 1) @ drawn(w.shape[1], len(w.shape)).to(w.dtype),
    }.values(),
    ids=lambda compute: "",
)
def test_products_are_those_of_the_sum(
    compute: Callable[[Any], Tensor], scale: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert same(factored(scale=scale), compute, monkeypatch)


def test_grouped_products_are_those_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(9, ROWS).float()
    weight = factored(dtype=torch.float32)
    assert same(weight, lambda w: F.grouped_mm(x, w, offs=OFFS), monkeypatch)
    transposed = factored(dtype=torch.float32)
    y = drawn(9, COLUMNS).float()
    assert same(transposed, lambda w: F.grouped_mm(y, w.transpose(-2, -1), offs=OFFS), monkeypatch)
    assert same(weight, lambda w: torch.ops.transformers.grouped_mm_fallback(x, w, offs=OFFS), monkeypatch)


def test_a_single_matrix_is_multiplied_by_way_of_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert same(factored(count=None), lambda w: F.linear(drawn(4, COLUMNS), w), monkeypatch)


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w.norm(dim=1),
        lambda w: torch.exp(w),
        lambda w: w[0, 1:3] * 2,
        lambda w: w.transpose(0, 1)[2],
        lambda w: torch.einsum("erc,c->er", w, drawn(COLUMNS)),
        lambda w: torch.matmul(w, w.mT),
    ],
)
def test_anything_else_is_done_with_the_sum(compute: Callable[[Any], Tensor]) -> None:
    weight = factored()
    assert_close(compute(weight), compute(weight.summed()))


def test_empty_groups_take_no_part_and_rows_behind_the_last_are_zero() -> None:
    x, left, right = drawn(11, ROWS), drawn(EXPERTS, ROWS, RANK, seed=1), drawn(EXPERTS, RANK, COLUMNS, seed=2)
    with torch.no_grad():
        left[1] = right[3] = float("nan")
    tensors = [tensor.requires_grad_() for tensor in (x, left, right)]
    found = grouped_product(*tensors, OFFS)
    assert_close(found[3:7], x[3:7] @ left[2] @ right[2])
    assert not found[9:].any()
    gradients = torch.autograd.grad(found.sum(), tensors)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert not gradients[1][1].any() and not gradients[2][3].any() and gradients[1][0].any()


def test_transforms_of_torch_see_through_grouped_products() -> None:
    x, left, right = drawn(11, ROWS), drawn(EXPERTS, ROWS, RANK, seed=1), drawn(EXPERTS, RANK, COLUMNS, seed=2)
    pushed = torch.func.jvp(lambda value: grouped_product(value, left, right, OFFS), (x,), (torch.ones_like(x),))[1]
    assert_close(pushed, grouped_product(torch.ones_like(x), left, right, OFFS))


def test_half_precision_sums_in_the_dtype_of_the_weight() -> None:
    weight = FactoredWeight(
        drawn(ROWS, COLUMNS).bfloat16(), [Product(drawn(ROWS, 1).float(), drawn(1, COLUMNS).float())]
    )
    with torch.autocast("cpu", torch.float16):
        assert weight.summed().dtype == torch.bfloat16
    assert F.linear(drawn(2, COLUMNS).bfloat16(), weight).dtype == torch.bfloat16  # type: ignore[arg-type]


def test_a_memory_estimate_takes_all_rows_as_one_group() -> None:
    with FakeTensorMode():
        x, left, right = torch.empty(9, ROWS), torch.empty(EXPERTS, ROWS, RANK), torch.empty(EXPERTS, RANK, COLUMNS)
        found = grouped_product(x, left, right, torch.empty(EXPERTS, dtype=torch.int32))
    assert found.shape == (9, COLUMNS)
