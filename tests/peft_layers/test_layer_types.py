"""Classes of adapted layers are called as PEFT's, are one for each method, and are pickled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
from torch import nn

import nbpeft
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.peft_layers import layer_types
from tests.tiny_models import gpt2, llama, logits

CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "linear": (llama, "LoraConfig", {"target_modules": ["q_proj", "embed_tokens"]}),
    "conv1d": (gpt2, "LoraConfig", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3)), "LoraConfig", {"target_modules": ["0"]}),
    "prefix": (llama, "HRAConfig", {"target_modules": ["q_proj"]}),
    "norms": (llama, "LNTuningConfig", {"target_modules": ["norm"]}),
    "parameter": (llama, "LoraConfig", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "blocks": (llama, "ShadowConfig", {"task_type": "CAUSAL_LM"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_classes_of_layers_are_called_as_in_peft(case: str) -> None:
    base, config, fields = CASES[case]
    ours, theirs = (library.get_peft_model(base(), getattr(library, config)(**fields)) for library in (nbpeft, peft))
    wrapped = [name for name, module in theirs.named_modules() if hasattr(module, "base_layer")]
    mine, its = ([type(model.get_submodule(name)) for name in wrapped] for model in (ours, theirs))
    assert wrapped and [one.__name__ for one in mine] == [one.__name__ for one in its]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(twin.get_submodule(name)) for name in wrapped] == mine


def test_a_class_is_that_of_the_first_adapter_s_method() -> None:
    model = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("other", nbpeft.IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[]))
    attention = model.get_base_model().model.layers[0].self_attn
    lora, ia3 = type(attention.q_proj), type(attention.v_proj)
    assert lora is not ia3 and lora.__name__ == ia3.__name__ == "Linear" and issubclass(lora, AdaptedLayer)
    assert isinstance(attention.v_proj, nbpeft.tuners.ia3.Linear) and repr(attention.v_proj).startswith("ia3.Linear(")
    before = logits(model)
    model.delete_adapter("default")
    assert type(attention.q_proj) is lora and logits(model).shape == before.shape


def test_layers_that_were_pickled_with_the_engine_s_class_load() -> None:
    model = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(target_modules=["q_proj"])).eval()
    for layer in model.manager.layers.values():
        layer.__class__ = AdaptedLayer
    again = pickle.loads(pickle.dumps(model))
    assert {type(layer) for layer in again.manager.layers.values()} == {AdaptedLayer}
    assert logits(again).equal(logits(model))


def test_other_names_are_no_classes() -> None:
    for name in ("Linear", "AdaptedLayer:", "Module:lora:Linear"):
        with pytest.raises(AttributeError, match=name):
            getattr(layer_types, name)
