"""Fingerprints of base models: what changes them and what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaModel

from nbpeft.checkpoint import Fingerprint, compare, fingerprint, is_same_base
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import BaseMismatchError
from nbpeft.model.quantization.quantize import quantize_model
from tests.tiny_models import gpt2, llama


def test_adapters_do_not_change_it() -> None:
    model = llama()
    bare = fingerprint(model)
    manager = AdapterManager.attach(model)
    manager.add("default", LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    manager.add("other", LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    assert fingerprint(model) == bare
    assert compare(bare.to_metadata(), model) is None
    manager.merge(["other"])
    assert fingerprint(model) != bare
    manager.unmerge()
    assert fingerprint(model) == bare


def test_only_the_same_weights_are_the_same_base() -> None:
    metadata = fingerprint(llama()).to_metadata()
    assert is_same_base(metadata, llama())
    assert not is_same_base(metadata, llama(seed=1))
    unknown = {key: value for key, value in metadata.items() if "weights" not in key}
    assert not is_same_base(unknown, llama()) and not is_same_base({}, llama())


def test_metadata_and_back() -> None:
    print_ = fingerprint(llama())
    metadata = print_.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert Fingerprint.from_metadata({**metadata, "format": "pt"}) == print_
    assert Fingerprint.from_metadata({}) is None
    assert Fingerprint.from_metadata({**metadata, "nbpeft.base.shapes": "[1"}) is None
    assert Fingerprint.from_metadata({**metadata, "nbpeft.base.shapes": "7"}) is None


@pytest.mark.parametrize(
    "shapes",
    ['{"1v x 4": 3}', '{"4 x 4": "x"}', '{"": 1}', "[[]]", "7", "[" * 50_000, '{"%s": 1}' % ("4 x " * 90 + "4")],
)
def test_a_damaged_fingerprint_is_none(shapes: str) -> None:
    metadata = {**fingerprint(llama()).to_metadata(), "nbpeft.base.shapes": shapes}
    assert Fingerprint.from_metadata(metadata) is None
    note = compare(metadata, llama())
    assert note is not None and "does not say which base" in note


def test_no_fingerprint_gives_a_note() -> None:
    note = compare({"format": "pt"}, llama())
    assert note is not None
    assert "does not say which base model" in note


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype(dtype: torch.dtype) -> None:
    saved = fingerprint(llama()).to_metadata()
    assert compare(saved, cast(llama(), dtype)) is None
    other = compare(saved, cast(llama(seed=1), dtype))
    # float16 is rounded otherwise than bfloat16, so its values cannot be compared.
    assert (other is None) == (dtype is torch.float16)


def test_tied_weights_and_memory_layout_do_not_matter() -> None:
    model = llama(tie_word_embeddings=True)
    saved = fingerprint(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert fingerprint(model) == saved
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert fingerprint(model) == saved


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: llama(seed=1), "other weights of the same shapes"),
        (lambda: llama(vocab_size=72), "differ in the weights of 72 x 32, 97 x 32"),
        (lambda: llama(num_hidden_layers=3), "differ in the weights of 32 x 16, 32 x 32, 64 x 32"),
    ],
)
def test_another_base_gives_a_note(other: Callable[[], nn.Module], words: str) -> None:
    note = compare(fingerprint(llama()).to_metadata(), other())
    assert note is not None
    assert words in note
    assert "\n" not in note


def test_a_base_is_described_by_the_shape_with_most_numbers() -> None:
    def model(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(*layers)

    many_small = model(*(nn.Linear(10, 10) for _ in range(4)), nn.Linear(11, 11))
    note = compare(fingerprint(many_small).to_metadata(), model(nn.Linear(10, 10)))
    assert note is not None and "with 5 weights, mostly 10 x 10" in note


def test_another_revision_is_noticed_by_a_small_change_of_one_matrix() -> None:
    model = llama()
    saved = fingerprint(model).to_metadata()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    note = compare(saved, model)
    assert note is not None
    assert "another revision" in note


def test_the_backbone_alone_is_told_apart() -> None:
    saved = fingerprint(llama()).to_metadata()
    note = compare(saved, LlamaModel(llama().config))
    assert note is not None
    assert "LlamaForCausalLM" in note
    assert "LlamaModel" in note


def test_no_shape_in_common_is_refused() -> None:
    saved = fingerprint(llama()).to_metadata()
    small = llama(hidden_size=48, num_hidden_layers=1, intermediate_size=80, vocab_size=100)
    with pytest.raises(BaseMismatchError, match="trained on another base model: LlamaForCausalLM") as caught:
        compare(saved, small)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.details["saved"], Fingerprint)


class Quantized(nn.Linear):
    """A linear layer whose weight is packed, as bitsandbytes packs it to 4 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_a_quantized_base_keeps_its_shapes() -> None:
    model, quantized = llama(), llama()
    for layer in quantized.model.layers:
        layer.self_attn.q_proj = Quantized(layer.self_attn.q_proj)
    packed = fingerprint(quantized)
    assert packed.dtype == "quantized"
    assert packed.weights == ""
    assert packed.shapes == fingerprint(model).shapes
    assert compare(packed.to_metadata(), model) is None
    assert compare(fingerprint(model).to_metadata(), quantized) is None


def test_codes_that_are_stored_as_numbers_are_not_compared_with_weights() -> None:
    pytest.importorskip("bitsandbytes")
    dense, packed = fingerprint(llama()), quantize_model(llama(), quant_storage="float32")
    assert (fingerprint(packed).dtype, fingerprint(packed).weights) == ("quantized", "")
    assert compare(dense.to_metadata(), packed) is None


def test_meta_and_empty_models() -> None:
    with torch.device("meta"):
        model = llama()
    print_ = fingerprint(model)
    assert print_.weights == ""
    assert print_.shapes == fingerprint(llama()).shapes
    assert fingerprint(nn.ReLU()) == Fingerprint("ReLU", {}, "none", "")


def test_conv1d() -> None:
    model = gpt2()
    assert fingerprint(model) == fingerprint(model)


def test_an_empty_tensor_is_part_of_it() -> None:
    found = fingerprint(nn.Embedding(0, 4))
    assert found.shapes == {"4 x 0": 1} and Fingerprint.from_metadata(found.to_metadata()) == found
