"""Functions of peft.functional and peft.utils beside peft's own."""

from __future__ import annotations

import inspect
from typing import Any

import peft
import peft.functional
import peft.helpers
import pytest
import torch

import nbpeft
from nbpeft.errors import ConfigError, UnknownAdapterError
from nbpeft.model import LoraConfig, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import adapted, config, llama, logits

MANY = ["cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"]


def trains(model: Any, name: str) -> set[bool]:
    return {parameter.requires_grad for parameter in model.manager.parameters(name)}


@pytest.mark.parametrize("name", MANY)
def test_signatures_begin_as_those_of_peft(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(m, name)) for m in (nbpeft, peft.functional))
    names = list(ours.parameters)
    assert names == list(theirs.parameters)[: len(names)]


@pytest.mark.parametrize("bare", [False, True])
def test_adapters_of_a_model_with_or_without_handle(bare: bool) -> None:
    handle = adapted(name="one")
    handle.add_adapter("two", config(r=2))
    model = handle.get_base_model() if bare else handle
    nbpeft.set_adapter(model, "two")
    assert handle.active_adapters == ["two"] and trains(handle, "two") == {True} and trains(handle, "one") == {False}
    nbpeft.set_adapter(model, ["one", "two"], inference_mode=True)
    assert handle.active_adapters == ["one", "two"] and trains(handle, "two") == {False}
    nbpeft.set_requires_grad(model, ["two"])
    assert trains(handle, "two") == {True} and trains(handle, "one") == {False}
    with pytest.raises(UnknownAdapterError):
        nbpeft.set_requires_grad(model, ["one", "three"], False)
    assert nbpeft.delete_adapter(model, "one", prefix="lora_") == ["two"]
    with pytest.warns(UserWarning, match="there is no adapter 'one' to delete; the model has: 'two'"):
        assert nbpeft.delete_adapter(model, "one") == ["two"]
    with pytest.raises(UnknownAdapterError):
        nbpeft.delete_adapter(model, ["two"])  # type: ignore[arg-type]
    assert nbpeft.delete_adapter(model, "two") is None


def test_mixed_precision_casts_what_peft_casts() -> None:
    dtypes = []
    for library in (nbpeft, peft):
        model = library.get_peft_model(llama(), library.LoraConfig(target_modules=["q_proj"]))
        library.cast_mixed_precision_params(model, torch.bfloat16)
        dtypes.append({(str(p.dtype), p.requires_grad, p.numel()) for p in model.parameters()})
    assert dtypes[0] == dtypes[1]
    assert {(name, grad) for name, grad, _ in dtypes[0]} == {("torch.float32", True), ("torch.bfloat16", False)}


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_packed_weights_stay_packed(storage: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = torch.nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4", quant_storage=storage)).to("cpu")
    model = get_peft_model(base, LoraConfig(target_modules=["0"])).eval()
    expected = model(torch.ones(1, 64))
    nbpeft.cast_mixed_precision_params(model, torch.bfloat16)
    assert base[0].base_layer.weight.dtype == storage
    assert_close(model(torch.ones(1, 64)), expected, dtype=torch.bfloat16, depth=2)


def test_adapters_are_made_float32() -> None:
    model = get_peft_model(llama().half(), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.manager.parameters("default")} == {torch.float16}
    nbpeft.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert {p.dtype for p in model.manager.parameters("default")} == {torch.float16}
    nbpeft.cast_adapter_dtype(model, "default")
    assert {p.dtype for p in model.manager.parameters("default")} == {torch.float32}


def test_a_dictionary_is_a_config() -> None:
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "use_rslora": True}
    ours, theirs = nbpeft.get_peft_config(fields), peft.get_peft_config(dict(fields))
    assert isinstance(ours, LoraConfig) and ours.to_dict() == theirs.to_dict()
    with pytest.raises(ConfigError, match="no 'peft_type'"):
        nbpeft.get_peft_config({"r": 4})
    for other in ("LORA", None, nbpeft.LoraConfig()):
        with pytest.raises(ConfigError, match="expected a dictionary with a 'peft_type'"):
            nbpeft.get_peft_config(other)


def test_caching_changes_no_output() -> None:
    model = adapted(use_dora=True)
    before = logits(model)
    with nbpeft.DoraCaching():
        assert torch.equal(logits(model), before)
    nbpeft.DoraCaching()(enabled=False)
    assert inspect.signature(nbpeft.DoraCaching).parameters.keys() == {"enabled"}
    assert inspect.signature(peft.helpers.DoraCaching).parameters.keys() == {"enabled"}


def test_errors_have_the_names_of_peft_too() -> None:
    with pytest.raises(nbpeft.NoMatchingPeftModuleError) as caught:
        get_peft_model(llama(), LoraConfig(target_modules=["nothing"]))
    assert isinstance(caught.value, nbpeft.PeftError)
    assert issubclass(peft.NoMatchingPeftModuleError, ValueError) and isinstance(caught.value, ValueError)
