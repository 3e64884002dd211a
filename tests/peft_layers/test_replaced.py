"""What scripts put on PEFT's layer classes, on both libraries."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import nbpeft
from nbpeft.engine.wrappers.layer import AdaptedLayer
from tests.closeness import assert_close
from tests.tiny_models import llama, logits

LIBRARIES = pytest.mark.parametrize("library", [peft, nbpeft], ids=["peft", "nbpeft"])
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def linear_of(library: Any) -> Any:
    return importlib.import_module(f"{library.__name__}.tuners.lora.layer").Linear


@pytest.fixture
def forward(library: Any) -> Iterator[Any]:
    """PEFT's own ``forward``, put back after the test."""
    cls = linear_of(library)
    own = cls.forward
    yield own
    cls.forward = own


def adapted(library: Any) -> Any:
    torch.manual_seed(0)
    config = library.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    return library.get_peft_model(llama(), config).eval()


@LIBRARIES
def test_a_forward_on_the_class_is_called(library: Any, forward: Any) -> None:
    model, calls = adapted(library), []
    before = logits(model)

    def without_scale(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.pop("scale", None))
        return forward(self, x, *args, **kwargs)

    linear_of(library).forward = without_scale
    assert_close(logits(model), before)
    assert calls == [None] * 4
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer(torch.ones(1, 32), scale=0.5).shape == (1, 32) and calls[-1] == 0.5
    linear_of(library).forward = forward
    assert_close(logits(model), before)
    assert len(calls) == 5


@LIBRARIES
def test_it_computes_with_the_layer_as_peft_shows_it(library: Any, forward: Any) -> None:
    def half(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                delta = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
                output = output + delta * self.scaling[name] / 2
        return output

    linear_of(library).forward = half
    found = logits(adapted(library))
    linear_of(library).forward = forward
    model = adapted(library)
    for layer in model.modules():
        if isinstance(layer, linear_of(library)):
            layer.scaling["default"] /= 2
    assert_close(found, logits(model))


@LIBRARIES
def test_other_layers_keep_their_own(library: Any, forward: Any) -> None:
    linear_of(library).forward = lambda self, x: x * 0
    embedding = library.get_peft_model(nn.Sequential(nn.Embedding(4, 3)), library.LoraConfig(target_modules=["0"]))
    assert embedding(torch.arange(4)).abs().sum() > 0
    config = library.LoHaConfig(r=2, target_modules=["0"])
    assert library.get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)(torch.ones(1, 4)).abs().sum() > 0


def test_a_forward_that_is_taken_off_again_leaves_nothing() -> None:
    cls, own = importlib.import_module("nbpeft.tuners.loha.layer").Linear, AdaptedLayer.forward
    before = vars(cls)["forward"]
    cls.forward = lambda self, x: x
    assert AdaptedLayer.forward is not own
    del cls.forward
    assert AdaptedLayer.forward is own
    cls.forward = before
    assert AdaptedLayer.forward is own


def test_what_no_layer_calls_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nbpeft.LoraLayer
    with pytest.warns(nbpeft.PeftWarning, match="LoraLayer.update_layer is replaced for layer classes of your own"):
        monkeypatch.setattr(layer, "update_layer", lambda self: None)
    with pytest.warns(nbpeft.PeftWarning, match="LoraLayer.active_adapter is replaced"):
        monkeypatch.setattr(layer, "active_adapter", property(lambda self: "a"))
    with pytest.warns(nbpeft.PeftWarning):
        monkeypatch.undo()

    class Own(layer):  # type: ignore[misc, valid-type]
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(layer, "_patched", True, raising=False)
        monkeypatch.setattr(Own, "update_layer", lambda self: None)
        monkeypatch.undo()
