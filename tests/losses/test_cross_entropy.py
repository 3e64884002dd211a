from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nbpeft.losses.cross_entropy import chunked_cross_entropy
from tests.closeness import assert_close
from tests.model.allocations import Allocations

CLASSES, FEATURES, TOKENS = 31, 7, 12


def head(**options):
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES, **options)


def inputs(dtype=torch.float32, learned=0.5):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, FEATURES, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, CLASSES, (TOKENS,), generator=generator)
    return hidden, targets.masked_fill(torch.rand(TOKENS, generator=generator) > learned, -100)


def gradients(compute, *tensors, factor=3):
    for tensor in tensors:
        tensor.grad = None
    loss = compute()
    (factor * loss).backward()
    return loss.detach(), [tensor.grad for tensor in tensors]


@pytest.mark.parametrize(("reduction", "smoothing"), [("mean", 0.0), ("mean", 0.1), ("sum", 0.0), ("sum", 0.1)])
@pytest.mark.parametrize("learned", [0.0, 0.5, 1.0])
def test_it_is_torchs_cross_entropy(reduction, smoothing, learned):
    layer = head()
    hidden, targets = inputs(learned=learned)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    whole, expected = gradients(lambda: F.cross_entropy(layer(hidden), targets, **options), hidden, *layer.parameters())
    for chunk_size in (1, 5, 12, 100):
        loss, found = gradients(
            lambda size=chunk_size: chunked_cross_entropy(layer, hidden, targets, chunk_size=size, **options),
            hidden,
            *layer.parameters(),
        )
        assert_close(loss, whole, equal_nan=True)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("learned", [0.0, 0.5, 1.0])
def test_each_row_can_have_a_loss_with_a_factor_of_its_own(learned, weighted, trains_head):
    layer = head().requires_grad_(trains_head)
    hidden, targets = inputs(learned=learned)
    weights = torch.linspace(0.5, 2, len(targets)) if weighted else None
    factors = torch.linspace(-1, 3, len(targets))
    scaled = factors if weights is None else factors * weights
    watched = [hidden, *(layer.parameters() if trains_head else ())]
    options: dict[str, Any] = {"reduction": "none"}
    whole, expected = gradients(lambda: F.cross_entropy(layer(hidden), targets, **options) @ scaled, *watched)
    options["weights"] = weights
    for chunk_size in (1, 5, 100):
        loss, found = gradients(
            lambda size=chunk_size: chunked_cross_entropy(layer, hidden, targets, chunk_size=size, **options) @ factors,
            *watched,
        )
        assert_close(loss, whole)
        assert_close(found, expected)


def test_each_row_has_a_factor_behind_a_head_that_keeps_its_output():
    layer = head()
    hidden, targets = inputs(learned=1.0)
    factors = torch.linspace(-1, 3, len(targets))
    watched = [hidden, *layer.parameters()]

    def kept(rows):
        return layer(rows).tanh()  # backward needs what it returns

    whole = gradients(lambda: F.cross_entropy(kept(hidden), targets, reduction="none") @ factors, *watched)
    found = gradients(
        lambda: chunked_cross_entropy(kept, hidden, targets, reduction="none", chunk_size=4) @ factors, *watched
    )
    assert_close(found, whole)


def test_another_index_is_ignored_and_a_head_may_be_half_frozen():
    layer = head()
    layer.weight.requires_grad_(False)
    hidden, targets = inputs(learned=1.0)
    targets[:4] = 3
    whole, expected = gradients(lambda: F.cross_entropy(layer(hidden), targets, ignore_index=3), hidden, layer.bias)
    loss, found = gradients(
        lambda: chunked_cross_entropy(layer, hidden, targets, ignore_index=3, chunk_size=3), hidden, layer.bias
    )
    assert_close(loss, whole)
    assert_close(found, expected)
    assert layer.weight.grad is None


def test_a_sample_is_of_three_chunks():
    layer, seen = head(), []
    hidden, targets = inputs(learned=1.0)

    def noted(rows):
        seen.append(rows.shape[0])
        return layer(rows)

    with torch.no_grad():
        chunked_cross_entropy(noted, hidden, targets, chunk_size=5, sampled=True)
        assert seen == [5, 5, 2]
        seen.clear()
        chunked_cross_entropy(noted, hidden, targets, chunk_size=2, sampled=True)
    assert seen == [2, 2, 2]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return 2 * logits

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_a_head_may_end_in_a_function_of_its_own():
    layer = head()
    hidden, targets = inputs()

    def doubled(rows):
        return Doubled.apply(layer(rows))

    whole, expected = gradients(lambda: F.cross_entropy(doubled(hidden), targets), hidden, *layer.parameters())
    loss, found = gradients(
        lambda: chunked_cross_entropy(doubled, hidden, targets, chunk_size=5), hidden, *layer.parameters()
    )
    assert_close(loss, whole)
    assert_close(found, expected)


def test_in_double_precision_gradients_are_exact():
    layer = head().double()
    hidden, targets = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda states, weight: chunked_cross_entropy(
            lambda rows: F.linear(rows, weight).tanh(), states, targets, chunk_size=4
        ),
        (hidden, layer.weight),
    )


@pytest.mark.parametrize("divisor", [None, 37.0])
def test_in_bfloat16_it_is_as_accurate_as_whole_logits(divisor):
    layer = head(bias=False).bfloat16().requires_grad_(False)
    hidden, targets = inputs(torch.bfloat16)
    reduction, scale = ("mean", 1) if divisor is None else ("sum", divisor)
    states, weight = hidden.detach().double().requires_grad_(), layer.weight.double()
    options: dict[str, Any] = {"reduction": reduction}
    exact, (truth,) = gradients(
        lambda: F.cross_entropy(F.linear(states, weight), targets, **options) / scale, states, factor=2
    )
    whole, (rounded,) = gradients(
        lambda: F.cross_entropy(layer(hidden).float(), targets, **options) / scale, hidden, factor=2
    )
    options |= {"chunk_size": 4, "divisor": divisor}
    loss, (found,) = gradients(
        lambda: chunked_cross_entropy(layer, hidden, targets, **options) / scale, hidden, factor=2
    )
    assert loss.dtype == torch.float32
    assert abs(loss - exact) <= abs(whole - exact) + 1e-6
    assert (found - truth).norm() <= 1.01 * (rounded - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made", [lambda rows: rows, lambda rows: rows.view(-1, FEATURES), lambda rows: rows.float()])
def test_a_head_that_returns_its_input_keeps_it(made, mode, learns, dtype):
    hidden = torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, targets = hidden.clone(), torch.arange(TOKENS) % FEATURES
    with mode():
        given = hidden.requires_grad_(learns)
        loss = chunked_cross_entropy(made, given, targets, chunk_size=5)
        expected = F.cross_entropy(made(before).float(), targets)
    assert torch.equal(hidden, before)
    assert_close(loss, expected)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("place", [slice(None), slice(4)])
def test_a_head_that_returns_its_own_tensor_keeps_it(place, mode, trained):
    own = nn.Parameter(torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0)), requires_grad=trained)
    before, targets = own.detach().clone(), torch.arange(4)
    with mode():
        loss = chunked_cross_entropy(lambda rows: own[place], torch.zeros(4, FEATURES), targets, chunk_size=4)
    assert torch.equal(own, before)
    assert_close(loss, F.cross_entropy(before, targets))


def test_a_head_that_returns_a_part_of_an_inference_tensor_keeps_it():
    targets = torch.arange(4)
    with torch.inference_mode():
        own = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
        before = own.clone()
        loss = chunked_cross_entropy(lambda rows: own[:4], torch.zeros(4, FEATURES), targets, chunk_size=4)
        assert torch.equal(own, before)
        assert_close(loss, F.cross_entropy(before[:4], targets))


def test_nothing_is_computed_for_backward_without_gradients():
    layer, calls = head(), []

    def counted(rows):
        calls.append((len(rows), torch.is_grad_enabled()))
        return layer(rows)

    hidden, targets = inputs(learned=1.0)
    with torch.no_grad():
        loss = chunked_cross_entropy(counted, hidden, targets, chunk_size=5)
    assert calls == [(5, False), (5, False), (2, False)]
    assert not loss.requires_grad


def test_tokens_that_are_not_learned_do_not_go_through_the_head():
    layer, rows_seen = head(), []

    def counted(rows):
        rows_seen.append(len(rows))
        return layer(rows)

    hidden, targets = inputs()
    chunked_cross_entropy(counted, hidden, targets, chunk_size=2).backward()
    learned = int((targets != -100).sum())
    assert sum(rows_seen) == learned + 1  # one more, which tells what the head trains
    assert max(rows_seen) == 2
    assert hidden.grad[targets == -100].abs().max() == 0


class Products(TorchDispatchMode):
    """Adds up the multiply-adds of matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.count += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result) // 2
        return result


@pytest.mark.parametrize(("dtype", "bytes_of_a_logit"), [(torch.float32, 4), (torch.bfloat16, 6)])
@pytest.mark.parametrize("trains_head", [False, True])
def test_a_head_computes_each_product_once_in_the_memory_of_one_chunk(trains_head, dtype, bytes_of_a_logit):
    tokens, features, classes, chunk_size = 64, 32, 2048, 16
    layer = nn.Linear(features, classes, bias=False, dtype=dtype).requires_grad_(trains_head)
    hidden = torch.randn(tokens, features, dtype=dtype, requires_grad=True)
    targets = torch.arange(tokens)
    with Products() as products, Allocations() as allocated:
        loss = chunked_cross_entropy(layer, hidden, targets, chunk_size=chunk_size)
    loss.backward()
    of_the_search, rest = features * classes, 8192  # the row that trained tensors are looked for with; one chunk's rows
    assert products.count == (3 if trains_head else 2) * tokens * features * classes + of_the_search
    gradients = hidden.nbytes + (layer.weight.numel() * (4 + dtype.itemsize) if trains_head else 0)
    assert allocated.peak <= bytes_of_a_logit * chunk_size * classes + gradients + rest
