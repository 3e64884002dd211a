"""Quantized experts as a tensor: equal to bitsandbytes, product by product to a dequantized copy, and never one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.kernels.quantized_matrices import Form, QuantizedMatrices, _grouped
from nbpeft.errors import ConfigError
from tests.closeness import assert_close
from tests.tiny_models import mixture, tokens

bitsandbytes = pytest.importorskip("bitsandbytes")

STORED = [("nf4", False), ("nf4", True), ("fp4", True), ("int8", False)]
WAYS = [("qwen3_moe", way) for way in ("eager", "grouped_mm", "batched_mm")]
WAYS += [("gpt_oss", "eager"), ("gpt_oss", "grouped_mm"), ("gpt_oss", "batched_mm"), ("llama4", "eager")]


def quantized(model: Any, kind: str = "nf4", double: bool = True) -> Any:
    """The model, frozen, with its experts quantized."""
    model.requires_grad_(False)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.ndim == 3:
                stored = QuantizedMatrices.of(weight.detach(), kind, double=double)
                module._parameters[name] = nn.Parameter(stored, requires_grad=False)
    return model


def dequantized(model: Any) -> Any:
    """A copy of a model whose experts are what its quantized ones stand for."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, QuantizedMatrices):
                module._parameters[name] = nn.Parameter(weight.dequantize(), requires_grad=False)
    return twin


def called(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and a gradient of the embedded tokens."""
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    output = model(inputs_embeds=embedded).logits
    output.square().sum().backward()
    return output.detach(), embedded.grad


@pytest.mark.parametrize("shape", [(3, 33, 7), (2, 64, 200)])
@pytest.mark.parametrize(("kind", "double"), STORED)
def test_each_matrix_is_quantized_as_bitsandbytes_does(kind: str, double: bool, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = QuantizedMatrices.of(weight, kind, double=double)
    functional = bitsandbytes.functional
    for i, matrix in enumerate(weight):
        if kind == "int8":
            expected = matrix.abs().amax(1, keepdim=True) / 127
            assert bool(((stored[i].dequantize() - matrix).abs() <= expected * 0.501).all())
            continue
        settings = {"blocksize": 64, "compress_statistics": double, "quant_type": kind}
        assert torch.equal(
            stored[i].dequantize(), functional.dequantize_4bit(*functional.quantize_4bit(matrix, **settings))
        )
    sizes = sum(part.untyped_storage().nbytes() for part in stored.parts.values())
    assert sizes == stored.nbytes == Form(kind, double, *shape[1:]).byte_count(shape[0])
    assert stored.shape == shape and stored.dtype == torch.float32


@pytest.mark.parametrize(("model_type", "way"), WAYS)
def test_mixtures_compute_what_their_dequantized_experts_give(model_type: str, way: str) -> None:
    for kind, double in (("nf4", True), ("int8", False)):
        model = quantized(mixture(model_type, way), kind, double)
        for found, expected in zip(called(model), called(dequantized(model)), strict=True):
            assert_close(found, expected)


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
def test_only_experts_that_tokens_reach_are_dequantized(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = quantized(mixture("qwen3_moe", way)), []
    plain = Form.dequantized

    def counted(self: Form, parts: Any, dtype: torch.dtype) -> Tensor:
        sizes.append(parts["codes"].ndim)
        return plain(self, parts, dtype)

    monkeypatch.setattr(Form, "dequantized", counted)
    embedded = model.get_input_embeddings()(tokens(1, 1)).detach().requires_grad_()
    output = model(inputs_embeds=embedded).logits
    forward = len(sizes)
    assert forward == 2 * 2 * 2  # layers, parameters, experts of a token
    output.sum().backward()
    assert len(sizes) == 2 * forward and set(sizes) == {1}


def test_whatever_else_is_done_with_it_is_done_with_a_copy() -> None:
    weight = torch.randn(3, 8, 64)
    stored, x = QuantizedMatrices.of(weight, "nf4"), torch.randn(5, 64)
    dense = stored.dequantize()
    assert torch.equal(stored.sum(0), dense.sum(0)) and torch.equal(stored + 1, dense + 1)
    assert torch.equal(x @ stored[-1].T, x @ dense[-1].T) and torch.equal(x @ stored.mT[1], x @ dense.mT[1])
    assert torch.equal(stored[torch.tensor([2, -2])].dequantize(), dense[torch.tensor([2, 1])])
    assert [torch.equal(one.dequantize(), other) for one, other in zip(stored, dense, strict=True)] == [True] * 3
    assert torch.zeros_like(stored).shape == weight.shape


def test_writing_is_refused_and_copying_quantizes() -> None:
    weight = torch.randn(2, 8, 64)
    stored = QuantizedMatrices.of(weight, "nf4", double=True)
    before = stored.dequantize()
    with pytest.raises(ConfigError, match="aten::mul_ would write into experts stored in nf4 double: they are frozen"):
        stored.mul_(2)
    assert torch.equal(stored.dequantize(), before)
    other = QuantizedMatrices.of(torch.randn(2, 8, 64), "nf4", double=True)
    other.copy_(weight)
    assert torch.equal(other.dequantize(), before)
    with pytest.raises(ConfigError, match=r"cannot store \(2, 8, 32\) in quantized matrices \(2, 8, 64\)"):
        other.copy_(weight[:, :, :32])


def test_models_are_copied_moved_and_stored_as_they_are(tmp_path: Any) -> None:
    model = quantized(mixture("gpt_oss"))
    expected, own = called(model)[0], model.model.layers[0].mlp.experts.down_proj
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        held = twin.model.layers[0].mlp.experts.down_proj
        assert isinstance(held, nn.Parameter) and held.codes.data_ptr() != own.codes.data_ptr()
        assert not held.requires_grad and torch.equal(called(twin)[0], expected)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = quantized(mixture("gpt_oss"))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.copy_(torch.ones(parameter.shape))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    assert torch.equal(called(again)[0], expected)
    halved = model.to(torch.bfloat16).model.layers[0].mlp.experts.down_proj
    assert halved.dtype == torch.bfloat16 and halved.codes.dtype == torch.uint8
    assert model.to("meta").model.layers[0].mlp.experts.down_proj.device.type == "meta"


def test_other_forms_of_a_grouped_product_are_left_to_torch() -> None:
    weight = QuantizedMatrices.of(torch.randn(2, 16, 8), "nf4")
    x, ends = torch.randn(4, 16), torch.tensor([1, 4], dtype=torch.int32)
    found = _grouped(None, x, weight, ends)
    wanted = [x[:1] @ weight.dequantize()[0], x[1:] @ weight.dequantize()[1]]
    assert_close(found, torch.cat(wanted))
    others: list[tuple[Any, ...]] = [(x, weight), (x, weight, ends, torch.ones(8)), (x[None], weight, ends)]
    for arguments in (*others, (x, weight[0], ends), (x, weight.dequantize(), ends)):
        assert _grouped(None, *arguments) is NotImplemented


def test_its_matrices_are_unbound_without_being_dequantized() -> None:
    stored = QuantizedMatrices.of(torch.linspace(-1, 1, 512).view(2, 64, 4), "nf4", double=False)
    for found in (stored.unbind(), stored.unbind(-3), [stored.select(0, 0), stored.select(-3, 1)]):
        assert [type(one) for one in found] == [QuantizedMatrices] * 2
        assert torch.equal(torch.stack([one.dequantize() for one in found]), stored.dequantize())
    assert [type(one) for one in stored.unbind(1)] == [Tensor] * 64
