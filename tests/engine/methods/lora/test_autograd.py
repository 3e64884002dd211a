"""The low-rank function: gradients, what it keeps, and where it runs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nbpeft.engine.kernels.numerics import add_delta, onednn_multiplies
from nbpeft.engine.layer_kinds.linear import Linear
from nbpeft.engine.methods.lora import autograd, products
from nbpeft.engine.methods.lora.autograd import _pieces
from nbpeft.engine.methods.lora.dropout import Dropout
from nbpeft.engine.methods.lora.low_rank import low_rank_of
from nbpeft.engine.methods.lora.products import adapted_linear
from tests.closeness import assert_close

NONE = Dropout(0.0, False)
LAYER = torch.nn.Linear(1, 1)


@pytest.fixture(autouse=True)
def small_inputs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes the small inputs of these tests by the functions that are for large ones."""
    monkeypatch.setattr(products, "_LEAST_LEAN", 0)


def factors(rank: int = 3, inputs: int = 8, outputs: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 5, inputs), (rank, inputs), (outputs, rank)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def low_rank_linear(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: Dropout, onto: Tensor | None = None
) -> Tensor:
    return low_rank_of(Linear()).forward(LAYER, x, (lora_A, lora_B, scaling), dropout, onto)


def plain(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B) * scaling


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_gradcheck(probability: float) -> None:
    x, lora_A, lora_B = factors()

    def run(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return low_rank_linear(*inputs, 1.7, Dropout(probability, True))

    assert torch.autograd.gradcheck(run, (x, lora_A, lora_B))


def test_second_derivatives() -> None:
    x, lora_A, lora_B = factors(rank=2, inputs=3, outputs=2)
    assert torch.autograd.gradgradcheck(lambda *inputs: low_rank_linear(*inputs, 0.5, NONE), (x, lora_A, lora_B))


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_plain_composition(base_dtype: torch.dtype) -> None:
    x, lora_A, lora_B = factors(dtype=torch.float32)
    x = x.detach().to(base_dtype).requires_grad_()
    results = []
    for function in (lambda: low_rank_linear(x, lora_A, lora_B, 2.0, NONE), lambda: plain(x, lora_A, lora_B, 2.0)):
        results.append(torch.autograd.grad(function().square().sum(), (x, lora_A, lora_B)))
    for own, composed in zip(*results, strict=True):
        assert own.dtype == composed.dtype
        assert_close(own, composed)


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_keeps_the_input_and_a_thin_product_for_backward(probability: float) -> None:
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    lora_A, lora_B = torch.randn(4, 32, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    onto = torch.randn(64, 16, dtype=torch.bfloat16)
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (x, lora_A, lora_B)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        low_rank_linear(x, lora_A, lora_B, 2.0, Dropout(probability, True), onto)
    assert sum(size for pointer, size in kept.items() if pointer not in own) == 64 * 4 * 4


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 6), (6, 8)])
def test_added_onto_an_output_is_the_sum(probability: float, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    x, lora_A, lora_B = factors(inputs=inputs, outputs=outputs, dtype=torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    onto = torch.randn(4, 5, outputs, dtype=dtype, requires_grad=True)
    results = []
    for whole in (True, False):
        torch.manual_seed(6)
        delta = low_rank_linear(x, lora_A, lora_B, 2.0, Dropout(probability, True), onto if whole else None)
        total = delta if whole else add_delta(onto, delta)
        results.append([total, *torch.autograd.grad(total.float().square().sum(), (x, lora_A, lora_B, onto))])
    for whole_part, part in zip(*results, strict=True):
        assert whole_part.dtype == part.dtype
        assert_close(whole_part, part)


@pytest.mark.parametrize("probability", [0.0, 0.5])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 6), (6, 8)])
def test_a_model_may_change_the_sum_in_place(probability: float, inputs: int, outputs: int) -> None:
    """As ``nn.ReLU(inplace=True)`` and ``x += …`` do behind a layer."""
    results = []
    for in_place in (True, False):
        x, lora_A, lora_B = factors(inputs=inputs, outputs=outputs, dtype=torch.float32)
        onto = torch.ones(4, 5, outputs).requires_grad_()
        torch.manual_seed(2)
        total = low_rank_linear(x, lora_A, lora_B, 2.0, Dropout(probability, True), onto)
        assert not total._is_view() and total.untyped_storage().nbytes() == total.nbytes
        total = F.relu(total, inplace=in_place)
        results.append([total, *torch.autograd.grad(total.square().sum(), (x, lora_A, lora_B, onto))])
    for changed, left in zip(*results, strict=True):
        assert torch.equal(changed, left)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(reentrant: bool) -> None:
    x, lora_A, lora_B = factors(dtype=torch.float32)
    dropout = Dropout(0.4, True)

    def gradients(run: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(11)
        return torch.autograd.grad(run().square().sum(), (x, lora_A, lora_B))

    direct = gradients(lambda: low_rank_linear(x, lora_A, lora_B, 2.0, dropout))
    if reentrant:
        for tensor in (x, lora_A, lora_B):
            tensor.grad = None
        torch.manual_seed(11)
        checkpoint(
            lambda i: low_rank_linear(i, lora_A, lora_B, 2.0, dropout), x, use_reentrant=True
        ).square().sum().backward()
        again = tuple(t.grad for t in (x, lora_A, lora_B))
    else:
        again = gradients(
            lambda: checkpoint(lambda i: low_rank_linear(i, lora_A, lora_B, 2.0, dropout), x, use_reentrant=False)
        )
    assert all(torch.equal(first, second) for first, second in zip(direct, again, strict=True))


def test_autocast_computes_in_its_dtype_in_both_directions() -> None:
    x, lora_A, lora_B = factors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = low_rank_linear(x, lora_A, lora_B, 2.0, NONE)
        composed = plain(x, lora_A, lora_B, 2.0)
    assert own.dtype == composed.dtype == torch.bfloat16
    assert_close(own, composed, depth=2)
    gradients = torch.autograd.grad(own.float().sum(), (x, lora_A, lora_B))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3


def test_everything_dropped_gives_zero() -> None:
    x, lora_A, lora_B = factors(dtype=torch.float32)
    assert not low_rank_linear(x, lora_A, lora_B, 2.0, Dropout(1.0, True)).any()


def with_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, drop: float = 0.0
) -> Tensor:
    """The layer and the product in one function, the mask drawn from a seed."""
    torch.manual_seed(3)
    output = adapted_linear(x, weight, bias, (lora_A, lora_B, 1.7), drop)
    assert output is not None
    return output


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_with_the_frozen_layer_it_is_the_same(probability: float, biased: bool) -> None:
    x, lora_A, lora_B = factors(dtype=torch.float32)
    weight, bias = torch.randn(6, 8), torch.randn(6) if biased else None
    torch.manual_seed(3)
    apart = low_rank_linear(x, lora_A, lora_B, 1.7, Dropout(probability, True), F.linear(x, weight, bias))
    whole = with_layer(x, weight, bias, lora_A, lora_B, drop=probability)
    assert torch.equal(whole, apart) and whole._base is None
    gradients = (torch.autograd.grad(one.square().sum(), (x, lora_A, lora_B)) for one in (whole, apart))
    for found, wanted in zip(*gradients, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ordinary_operations_on_small_inputs_are_the_same(
    probability: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, lora_A, lora_B = factors(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    weight, results = torch.randn(6, 8, dtype=dtype), []
    for least in (0, 1 << 15):
        monkeypatch.setattr(products, "_LEAST_LEAN", least)
        torch.manual_seed(3)
        if dtype == torch.float64:
            output = with_layer(x, weight, None, lora_A, lora_B, drop=probability)
        else:
            output = low_rank_linear(x, lora_A, lora_B, 1.7, Dropout(probability, True), F.linear(x, weight))
        assert ("_LowRank" in type(output.grad_fn).__name__) == (least == 0)
        results.append([output, *torch.autograd.grad(output.to(lora_A.dtype).square().sum(), (x, lora_A, lora_B))])
    for small, lean in zip(*results, strict=True):
        assert small.dtype == lean.dtype
        assert_close(small, lean, depth=3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_no_function_is_called(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, lora_A, lora_B = (value.detach().to(dtype) for value in factors(dtype=torch.float32))
    weight, bias = torch.randn(6, 8, dtype=dtype), torch.randn(6, dtype=dtype)
    learned = [lora_A.clone().requires_grad_(), lora_B]
    wanted = low_rank_linear(x, *learned, 1.7, NONE, F.linear(x, weight, bias)).detach()
    monkeypatch.setattr(autograd, "_LowRank", None)
    found = low_rank_linear(x, lora_A, lora_B, 1.7, NONE, F.linear(x, weight, bias))
    assert_close(found, wanted, depth=2)
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(with_layer(x, weight, bias, *learned), wanted)


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_gradcheck_with_the_frozen_layer(probability: float) -> None:
    weight, bias = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def run(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return with_layer(x, weight, bias, lora_A, lora_B, drop=probability)

    inputs = factors(rank=2, inputs=3, outputs=2)
    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


def test_other_dtypes_trained_layers_and_autocast_take_the_layer_by_itself() -> None:
    x, lora_A, lora_B = factors(dtype=torch.float32)
    weight = torch.randn(6, 8)
    assert adapted_linear(x, weight, None, (lora_A, lora_B, 1.0), 0.0) is not None
    assert adapted_linear(x.bfloat16(), weight.bfloat16(), None, (lora_A, lora_B, 1.0), 0.0) is None
    assert adapted_linear(x, weight.clone().requires_grad_(), None, (lora_A, lora_B, 1.0), 0.0) is None
    assert adapted_linear(x, weight, torch.zeros(6, requires_grad=True), (lora_A, lora_B, 1.0), 0.0) is None
    assert adapted_linear(x, weight, None, (lora_A, lora_B, 1.0), 1.0) is None
    assert adapted_linear(x, weight.double(), None, (lora_A, lora_B, 1.0), 0.0) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted_linear(x, weight, None, (lora_A, lora_B, 1.0), 0.0) is None


ON_MANY_TOKENS = (512, 256)
"""Tokens and width of an input in bfloat16 whose wide products are computed from pieces of the factors."""
with_onednn = pytest.mark.skipif(not onednn_multiplies(torch.bfloat16), reason="this processor computes no bfloat16")


def in_bfloat16(drop: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Dropout]:
    """An input, a layer's weight and bias, all in bfloat16, and factors in float32."""
    generator = torch.Generator().manual_seed(2)
    tokens, width = ON_MANY_TOKENS
    x, weight = (torch.randn(rows, width, generator=generator).bfloat16() for rows in (tokens, 192))
    lora_A, lora_B = (torch.randn(shape, generator=generator) / 8 for shape in ((7, width), (192, 7)))
    for learned in (x, lora_A, lora_B):
        learned.requires_grad_()
    return x, weight / 16, weight[:, 0].clone(), lora_A, lora_B, Dropout(drop, True)


@pytest.mark.parametrize("shape", [(9, 3), (3, 9)])
def test_pieces_of_factors_have_their_product(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, generator=generator) for size in ((5, 3), shape))
    dim = shape.index(3)
    pieces = _pieces(left, right, torch.bfloat16, dim)
    assert [one.dtype for one in pieces] == [torch.bfloat16] * 2
    found, wanted, most = (
        (one.double() @ (other if dim == 0 else other.T).double())
        for one, other in (pieces, (left, right), (left.abs(), right.abs()))
    )
    assert ((found - wanted).abs() <= 2**-16 * most).all()


@with_onednn
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_a_bfloat16_layer_is_added_to_from_pieces(probability: float) -> None:
    """Only one element in hundreds, whose sum is almost between two values, is rounded to the other one."""
    x, weight, bias, lora_A, lora_B, dropout = in_bfloat16(probability)
    torch.manual_seed(3)
    whole = adapted_linear(x, weight, bias, (lora_A, lora_B, 2.0), dropout.active_probability)
    assert whole is not None and whole.dtype == torch.bfloat16 and whole._base is None
    torch.manual_seed(3)
    frozen = F.linear(x, weight, bias)
    apart = low_rank_linear(x, lora_A, lora_B, 2.0, dropout, frozen)
    torch.manual_seed(3)
    dropped = F.dropout(x.float(), probability)
    wanted = (frozen.float() + plain(dropped, lora_A, lora_B, 2.0)).bfloat16()
    upstream = torch.randn_like(whole)
    for found in (whole, apart):
        assert (found == wanted).float().mean() > 0.99
        assert torch.allclose(found, wanted, rtol=2**-7, atol=2e-4)
        gradients, right = (
            torch.autograd.grad(one, (x, lora_A, lora_B), upstream, retain_graph=True) for one in (found, wanted)
        )
        for gradient, other in zip(gradients, right, strict=True):
            rtol = 2**-6 if gradient.dtype == torch.bfloat16 else 1e-5
            assert gradient.dtype == other.dtype
            assert torch.allclose(gradient, other, rtol=rtol, atol=rtol * float(other.detach().abs().max()))
    assert torch.equal(whole, apart)


@with_onednn
def test_an_adapter_of_zeros_changes_no_bit_in_bfloat16() -> None:
    x, weight, bias, lora_A, lora_B, dropout = in_bfloat16()
    output = adapted_linear(x, weight, bias, (lora_A, torch.zeros_like(lora_B), 2.0), dropout.active_probability)
    assert output is not None and torch.equal(output, F.linear(x, weight, bias))


@with_onednn
def test_pieces_are_for_many_tokens_and_where_bfloat16_is_multiplied_fast() -> None:
    x, weight, _, lora_A, lora_B, dropout = in_bfloat16()
    factors = (lora_A, lora_B, 2.0)
    assert adapted_linear(x, weight, None, factors, dropout.active_probability) is not None
    assert adapted_linear(x[1:], weight, None, factors, dropout.active_probability) is None
    assert (
        adapted_linear(x, weight, None, (lora_A.bfloat16(), lora_B.bfloat16(), 2.0), dropout.active_probability) is None
    )
    assert adapted_linear(x, weight, None, (lora_A, lora_B.bfloat16(), 2.0), dropout.active_probability) is None
    assert adapted_linear(x.half(), weight.half(), None, factors, dropout.active_probability) is None
    with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
        assert adapted_linear(x, weight, None, factors, dropout.active_probability) is None
