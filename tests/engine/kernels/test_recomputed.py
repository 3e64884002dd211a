"""One call that is repeated in backward: who gets its output, what is left of it, and gradients in parts."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.engine.kernels.recomputed import Origin, origin_of, parts_of, recompute
from tests.closeness import assert_close


def found(tensor: Tensor) -> Origin:
    origin = origin_of(tensor)
    assert origin is not None
    return origin


@pytest.mark.parametrize("pointwise", [False, True])
def test_the_output_lives_until_its_last_reader_has_it(pointwise: bool) -> None:
    x = torch.randn(5, 7, requires_grad=True)
    origin = found(y := recompute(F.silu, x, pointwise=pointwise))
    part = found(parts_of(y, [1, 2, 2])[1])
    for each in (origin, part):
        each.recomputation.add_reader()
    first = origin.recomputation.output(origin.inputs)
    assert torch.equal(first, y) and not first.requires_grad
    second = part.recomputation.output(part.inputs)
    assert second.data_ptr() == first[1:3].data_ptr()
    alive = weakref.ref(first.untyped_storage())
    del first, second
    assert alive() is None
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("shape", [(1,), (3, 7), (0, 4), (3, 50_000), (2, 300, 1001)])
def test_a_gradient_in_parts_is_that_of_the_whole(shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    wanted = torch.autograd.grad(gated(gate, up).square().sum(), (gate, up))
    parts = torch.autograd.grad(recompute(gated, gate, up, pointwise=True).square().sum(), (gate, up))
    assert_close(parts, wanted)


def test_inputs_of_several_strides_and_one_that_is_not_trained() -> None:
    gate, up = torch.randn(6, 4).t().requires_grad_(), torch.randn(4, 6)
    y = recompute(torch.mul, gate, up, pointwise=True)
    assert torch.equal(torch.autograd.grad(y, gate, torch.ones(4, 1).expand(4, 6))[0], up)


def test_what_is_broadcast_is_taken_as_a_whole() -> None:
    x, factor = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    recompute(torch.mul, x, factor, pointwise=True).sum().backward()
    assert factor.grad is not None
    assert_close(factor.grad, x.detach().sum(0))
