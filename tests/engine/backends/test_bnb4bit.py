from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from nbpeft.engine.backends.bnb4bit import Bnb4bit
from tests.closeness import assert_close
from tests.engine.backends.support import backend_name, check_grid_of_larger_weight, error, evaluate
from tests.pretend_cpu import pretend_repacking, repack, repacked_product

bnb = pytest.importorskip("bitsandbytes")
backend = Bnb4bit()

REPACKS = bool(bnb.functional.has_avx512bf16())
"""Whether the library has a kernel for re-packed weights on this processor."""

only_repacked = pytest.mark.parametrize("repacks", [True], indirect=True, ids=["repacked"])


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "repacked"])
def repacks(request, monkeypatch) -> bool:
    """Whether the library changes the layout in the first eval forward."""
    pretend_repacking(monkeypatch, request.param)
    return request.param


def quantized(
    out_features=64, in_features=128, *, bias=False, quant_type="nf4", double=False, storage=torch.uint8,
    dtype=torch.float32, compute=None, seed=0,
):  # fmt: skip
    torch.manual_seed(seed)
    dense = nn.Linear(in_features, out_features, bias=bias)
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias=bias, compute_dtype=compute or dtype, compress_statistics=double,
        quant_type=quant_type, quant_storage=storage,
    )  # fmt: skip
    weight = dense.weight.detach().to(dtype)
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=double, quant_type=quant_type,
        quant_storage=storage, module=layer,
    )  # fmt: skip
    if bias:
        layer.bias = nn.Parameter(dense.bias.detach().to(dtype), requires_grad=False)
    return layer.to("cpu"), weight


def inputs(layer, dtype=torch.float32, rows=5):
    torch.manual_seed(1)
    return torch.randn(rows, layer.in_features, dtype=dtype)


def is_packed(layer):
    return getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


SETTINGS = [
    pytest.param(
        quant_type, double, storage, dtype, id=f"{quant_type}-{double}-{storage}-{dtype}".replace("torch.", "")
    )
    for quant_type, double, storage, dtype in [
        ("nf4", False, torch.uint8, torch.float32),
        ("nf4", True, torch.uint8, torch.bfloat16),
        ("nf4", True, torch.bfloat16, torch.float16),
        ("fp4", False, torch.float16, torch.bfloat16),
        ("fp4", True, torch.uint8, torch.float32),
        ("nf4", False, torch.float32, torch.bfloat16),
    ]
]


@pytest.mark.parametrize(("quant_type", "double", "storage", "dtype"), SETTINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_dequantize_before_any_forward(quant_type, double, storage, dtype, bias):
    layer, weight = quantized(bias=bias, quant_type=quant_type, double=double, storage=storage, dtype=dtype)
    assert backend_name(layer) == "bnb4bit"
    found = backend.dequantize(layer)
    assert torch.equal(found, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    assert found.shape == weight.shape
    assert found.dtype == backend.dtype(layer) == dtype
    assert error(found, weight) < (0.11 if quant_type == "nf4" else 0.16)
    assert backend.device(layer) == torch.device("cpu")
    assert not found.requires_grad


@pytest.mark.parametrize(("quant_type", "double", "storage", "dtype"), SETTINGS)
def test_dequantize_after_eval_forward_is_what_the_forward_used(quant_type, double, storage, dtype, repacks):
    layer, weight = quantized(64, 192, quant_type=quant_type, double=double, storage=storage, dtype=dtype)
    before = backend.dequantize(layer)
    x = inputs(layer, dtype)
    output = evaluate(layer, x)
    assert is_packed(layer) == repacks
    after = backend.dequantize(layer)
    assert after.dtype == dtype == backend.dtype(layer)
    # The library rounds the constants to bfloat16 when it re-packs: 8 bits of mantissa.
    assert error(after, before) < 0.004
    assert error(output, x.float() @ after.float().t()) < 0.01
    assert error(after, weight) < (0.11 if quant_type == "nf4" else 0.16)


@only_repacked
def test_peft_reads_garbage_after_a_forward_and_this_does_not():
    from peft.utils.integrations import dequantize_bnb_weight

    layer, weight = quantized()
    evaluate(layer, inputs(layer))
    assert error(dequantize_bnb_weight(layer.weight, layer.weight.quant_state), weight) > 1.0
    assert error(backend.dequantize(layer), weight) < 0.11


@pytest.mark.parametrize("double", [False, True])
def test_dequantize_after_state_dict_of_a_packed_module(double):
    layer, weight = quantized(double=double)
    evaluate(layer, inputs(layer))
    layer.state_dict()
    assert not is_packed(layer)
    assert error(backend.dequantize(layer), weight) < 0.12


@pytest.fixture
def eager() -> Iterator[None]:
    """Runs what bitsandbytes compiles for each shape, which takes seconds, as it is written."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("shape", [(5, 7), (3, 65), (33, 64), (32, 96), (1, 64), (64, 1), (31, 33), (4, 128)])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_odd_sizes(shape, double, quant_type):
    layer, weight = quantized(*shape, double=double, quant_type=quant_type)
    reference = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    found = backend.dequantize(layer)
    assert_close(found, reference)
    snapshot = backend.snapshot(layer)
    backend.store(layer, weight * 2)
    assert error(backend.dequantize(layer), weight * 2) < 0.2
    backend.restore(layer, snapshot)
    assert torch.equal(backend.dequantize(layer), found)
    x = inputs(layer).requires_grad_()
    layer.train()(x).sum().backward()
    assert_close(x.grad, found.sum(0).expand_as(x))


@pytest.mark.parametrize(("quant_type", "double", "storage", "dtype"), SETTINGS)
@pytest.mark.parametrize("forward_first", [False, True])
def test_store_then_forward(quant_type, double, storage, dtype, forward_first):
    layer, weight = quantized(bias=True, quant_type=quant_type, double=double, storage=storage, dtype=dtype)
    x = inputs(layer, dtype)
    if forward_first:
        evaluate(layer, x)
    identity = id(layer.weight)
    new = weight.float() + 0.05 * torch.randn(weight.shape)
    backend.store(layer, new)
    assert id(layer.weight) == identity
    assert layer.weight.quant_state is layer.quant_state
    assert not is_packed(layer)
    assert layer.weight.dtype == storage
    assert layer.weight.quant_state.nested == double
    stored = backend.dequantize(layer)
    assert stored.dtype == dtype
    assert error(stored, new) < (0.11 if quant_type == "nf4" else 0.16)
    expected = x.float() @ stored.float().t() + layer.bias.float()
    assert error(evaluate(layer, x), expected) < 0.02
    assert error(layer.train()(x), expected) < 0.02


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_store_of_dequantize_changes_nearly_nothing(double, quant_type):
    layer, _ = quantized(double=double, quant_type=quant_type)
    before = backend.dequantize(layer)
    backend.store(layer, before)
    once = backend.dequantize(layer)
    assert error(once, before) < (0.02 if double else 1e-6)
    backend.store(layer, once)
    assert error(backend.dequantize(layer), before) < (0.02 if double else 1e-6)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_is_at_least_as_near_as_the_library(double, quant_type, dtype):
    layer, weight = quantized(double=double, quant_type=quant_type, dtype=dtype)
    new = weight.float() + 0.02 * torch.randn(weight.shape)
    backend.store(layer, new)
    library = bnb.nn.Params4bit(new.clone(), compress_statistics=double, quant_type=quant_type).to("cpu")
    theirs = bnb.functional.dequantize_4bit(library.data, library.quant_state)
    assert error(backend.dequantize(layer), new) < error(theirs, new)


@pytest.mark.drawn(20)
@pytest.mark.parametrize(("quant_type", "double", "storage", "dtype"), SETTINGS)
@pytest.mark.parametrize("forward_before", [False, True])
@pytest.mark.parametrize("forward_between", [False, True])
def test_restore_is_bit_equal(quant_type, double, storage, dtype, forward_before, forward_between):
    layer, _ = quantized(bias=True, quant_type=quant_type, double=double, storage=storage, dtype=dtype)
    x = inputs(layer, dtype)
    twin = copy.deepcopy(layer)
    expected_output = evaluate(twin, x)
    if forward_before:
        evaluate(layer, x)
    weight, codes = backend.dequantize(layer), layer.weight.data.clone()
    snapshot = backend.snapshot(layer)
    for _ in range(2):
        backend.store(layer, weight.float() * 1.5 + 0.1)
        if forward_between:
            assert not torch.equal(evaluate(layer, x), expected_output)
        backend.restore(layer, snapshot)
        assert torch.equal(layer.weight.data.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(backend.dequantize(layer), weight)
        assert torch.equal(evaluate(layer, x), expected_output)


def test_restore_after_only_forwards_between():
    layer, _ = quantized()
    x = inputs(layer)
    weight = backend.dequantize(layer)
    snapshot = backend.snapshot(layer)
    output = evaluate(layer, x)
    backend.restore(layer, snapshot)
    assert not is_packed(layer)
    assert torch.equal(backend.dequantize(layer), weight)
    assert torch.equal(evaluate(layer, x), output)


@pytest.mark.parametrize(("quant_type", "double", "storage", "dtype"), SETTINGS)
@pytest.mark.parametrize("before", ["nothing", "eval", "eval, state_dict"])
def test_a_prepared_module_has_one_output_and_gradients(quant_type, double, storage, dtype, before, repacks):
    layer, _ = quantized(bias=True, quant_type=quant_type, double=double, storage=storage, dtype=dtype)
    x = inputs(layer, dtype)
    if before != "nothing":
        evaluate(layer, x)
    if before.endswith("state_dict"):
        layer.state_dict()
    weight = backend.dequantize(layer)
    hooks = {name: len(value) for name, value in vars(layer).items() if "hooks" in name}
    assert backend.prepare(layer) == repacks and not backend.prepare(layer)
    assert torch.equal(backend.dequantize(layer), weight)
    output = evaluate(layer, x)
    expected = x.float() @ weight.float().t() + layer.bias.float()
    assert error(output, expected) < (1e-6 if dtype == torch.float32 else 4e-3)
    for mode in (True, False):
        y = x.clone().requires_grad_()
        trained = layer.train(mode)(y)
        trained.sum().backward()
        assert torch.equal(trained, output)
        assert error(y.grad, weight.sum(0).expand_as(y)) < 0.01
        layer.state_dict()
    assert torch.equal(evaluate(copy.deepcopy(layer), x), output) and torch.equal(evaluate(layer, x), output)
    assert torch.equal(backend.dequantize(layer), weight) and layer.weight.dtype == storage
    assert hooks == {name: len(value) for name, value in vars(layer).items() if "hooks" in name}
    backend.store(layer, weight * 2)
    assert layer.weight.quant_state.nested == double
    assert error(backend.dequantize(layer), weight * 2) < 0.02


def test_a_released_module_is_repacked_again(repacks):
    layer, _ = quantized()
    x = inputs(layer)
    expected = evaluate(layer, x)
    if backend.prepare(layer):
        backend.release(layer)
    assert torch.equal(evaluate(layer, x), expected) and is_packed(layer) == repacks


@pytest.mark.parametrize("shape", [(33, 64), (32, 96)])
def test_a_shape_that_cannot_be_repacked_stays_plain(shape):
    layer, _ = quantized(*shape)
    assert not backend.prepare(layer) and not layer.support_avx512bf16_for_cpu


@only_repacked
def test_constants_are_what_the_kernels_of_accelerators_take():
    layer, _ = quantized(double=True)
    evaluate(layer, inputs(layer))
    backend.prepare(layer)
    assert layer.weight.quant_state.absmax.dtype == torch.float32 and layer.weight.quant_state.absmax.dim() == 1


@pytest.mark.parametrize("forward_first", [False, True])
def test_pickled_it_keeps_the_class_of_its_parameter(forward_first):
    layer, _ = quantized(double=True)
    x = inputs(layer)
    if forward_first:
        evaluate(layer, x)
    backend.prepare(layer)
    expected = evaluate(layer, x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        for twin in (again, copy.deepcopy(again)):
            assert type(twin.weight) is bnb.nn.Params4bit and not twin.weight.requires_grad
            assert torch.equal(evaluate(twin, x), expected)


@pytest.mark.skipif(not REPACKS, reason="the library has no kernel for re-packed weights on this processor")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@only_repacked
def test_what_tests_pretend_is_what_the_library_computes(quant_type, dtype):
    layer, _ = quantized(96, 192, quant_type=quant_type, dtype=dtype)
    repack(layer)
    for rows in (1, 40):
        x = inputs(layer, dtype, rows).view(1, rows, -1)
        pretended = repacked_product(x, layer.weight.data, state=layer.weight.quant_state)
        assert (evaluate(layer, x) != pretended).float().mean() < 0.002  # sums in another order


@pytest.mark.parametrize(("quant_type", "double", "storage", "dtype"), SETTINGS)
def test_byte_count(quant_type, double, storage, dtype):
    layer, _ = quantized(128, 192, quant_type=quant_type, double=double, storage=storage, dtype=dtype)
    codes, blocks, table = 128 * 192 // 2, 128 * 192 // 64, 16 * 4
    nested = -(-blocks // 256) * 4 + 256 * 4 + 4
    assert backend.byte_count(layer) == codes + table + (blocks + nested if double else 4 * blocks)


def test_a_layer_that_is_not_quantized_yet():
    layer = bnb.nn.Linear4bit(8, 4, bias=False, quant_type="nf4")
    weight = layer.weight.detach().clone()
    assert torch.equal(backend.dequantize(layer), weight)
    snapshot = backend.snapshot(layer)
    backend.store(layer, weight + 1)
    assert torch.equal(backend.dequantize(layer), weight + 1)
    backend.restore(layer, snapshot)
    assert torch.equal(backend.dequantize(layer), weight)
    assert backend.byte_count(layer) == 8 * 4 * 4


def test_embedding():
    torch.manual_seed(0)
    dense = nn.Embedding(20, 64)
    layer = bnb.nn.EmbeddingNF4(20, 64)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu")
    assert backend_name(layer) == "bnb4bit"
    weight = backend.dequantize(layer)
    tokens = torch.tensor([0, 3, 19])
    assert_close(layer(tokens), weight[tokens])
    backend.store(layer, dense.weight * 2)
    assert_close(layer(tokens), backend.dequantize(layer)[tokens])


@pytest.mark.parametrize(("quant_type", "double", "storage", "dtype"), SETTINGS)
def test_a_grid_is_where_the_weight_lies_and_can_be_stored(quant_type, double, storage, dtype):
    layer, _ = quantized(quant_type=quant_type, double=double, storage=storage, dtype=dtype)
    if dtype == torch.bfloat16:
        evaluate(layer, inputs(layer, dtype))  # re-packed, where the processor does so
    before = backend.dequantize(layer)
    grid = backend.grid(layer, before.float())
    assert torch.equal(backend.dequantize(layer), before)
    units = before.float() / grid.scales
    assert float((units[..., None] - grid.levels).abs().amin(-1).max()) < 0.02  # as near as the weight's dtype comes
    places = torch.randint(0, 16, before.shape, dtype=torch.uint8)
    backend.restore(layer, grid.stored(places))
    assert error(backend.dequantize(layer), grid.values(places)) < (1e-6 if dtype == torch.float32 else 4e-3)
    x = inputs(layer, dtype)
    assert error(evaluate(layer, x), x.float() @ grid.values(places).T) < 0.02


def test_a_weight_that_is_not_quantized_yet_has_no_grid():
    assert backend.grid(bnb.nn.Linear4bit(64, 32), torch.zeros(32, 64)) is None


@pytest.mark.parametrize(("inputs", "outputs", "has_one"), [(96, 64, False), (64, 96, True)])
def test_a_weight_whose_blocks_extend_over_the_ends_of_rows_has_no_grid(inputs, outputs, has_one):
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False).to("cpu")
    assert (backend.grid(layer, backend.dequantize(layer)) is not None) == has_one


def test_a_grid_reaches_as_far_as_the_weight_to_round():
    check_grid_of_larger_weight(backend, quantized()[0])
