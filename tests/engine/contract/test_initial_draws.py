"""One seed gives one start: new parameters and the generator after them are as in peft."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import nbpeft
from nbpeft.engine.contract.initial_draws import drawn, linear_, skip_linear
from nbpeft.engine.contract.registry import methods
from nbpeft.model import get_peft_model
from tests.closeness import SINGULAR_VECTORS, assert_approximates, assert_close, assert_same
from tests.tiny_models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
NORMS = {"target_modules": ["input_layernorm", "norm"]}
INITS = ("init_weights", "init_lora_weights", "init_ia3_weights")

NOT_ALIKE = {
    "leaves memory as it is": ("tinylora-u8-random", "tinylora-drawn-random"),
    "draws the noise of many steps before the first": ("lora-plain-monteclora", "lora-entropy-monteclora"),
    "has it on GPTQ layers alone": ("lora-groups-qalora",),
}
"""What peft does otherwise -> samples that start otherwise."""
COMPUTED = ("magnitude", "prompt_embeddings")
"""Tensors that are computed, not drawn alone."""


def samples() -> list[Any]:
    found = []
    for method in methods():
        if not hasattr(peft.PeftType, method.peft_type):
            continue
        names = {one.name for one in dataclasses.fields(method.config_class)}
        for name, fields in method.sample_configs.items():
            label = f"{method.peft_type.lower()}-{name}"
            label += f"-{method.label.lower().replace('-', '')}" if method.peft_type == "LORA" else ""
            targets = {} if method.transforms_calls else NORMS if method.kinds.only else LINEAR
            own = {**targets, **fields} | ({"feedforward_modules": []} if method.peft_type == "IA3" else {})
            init = next((one for one in INITS if one in names), "")
            values: list[dict[str, Any]] = [own]
            if init and init not in fields and not method.transforms_calls:
                values.append(own | {init: False})
            for value, suffix in zip(values, ("", "-random"), strict=False):
                if not (label + suffix).startswith(sum(NOT_ALIKE.values(), ())):
                    found.append(pytest.param(method.config_class.__name__, value, id=label + suffix))
    return found


def started(library: Any, make: Callable[[], Any], config: str, fields: dict[str, Any], **options: Any) -> Any:
    """The tensors of a new adapter by peft's keys, and the state of the generator after it."""
    base = make()
    torch.manual_seed(5)
    model = library.get_peft_model(base, getattr(library, config)(**fields), **options)
    state = torch.get_rng_state()
    tensors = library.get_peft_model_state_dict(model)
    return {key: value.detach().clone() for key, value in tensors.items()}, state


def check_alike(make: Callable[[], Any], config: str, fields: dict[str, Any], **options: Any) -> None:
    ours, state = started(nbpeft, make, config, fields, **options)
    theirs, state_of_peft = started(peft, make, config, fields, **options)
    # What peft writes once more for each layer, and buffers of zeros.
    keys = [key for key in theirs if key in ours]
    assert keys and all(key.endswith(("randlora_A", "randlora_B", ".zeros")) for key in theirs.keys() - ours.keys())
    from_weight = fields.get("init_lora_weights") == "olora"
    for key in keys:
        if "adamss_A" in key:  # equal singular values leave open which directions span their space
            (own, other) = (tensors[key].T @ tensors[key] for tensors in (ours, theirs))
            assert_approximates(own, other, SINGULAR_VECTORS, message=key)
            continue
        alike = assert_close if from_weight or any(part in key for part in COMPUTED) else assert_same
        alike(ours[key], theirs[key], message=key)
    assert torch.equal(state, state_of_peft)


@pytest.mark.drawn(50)
@pytest.mark.parametrize(("config", "fields"), samples())
def test_every_method_starts_as_in_peft(config: str, fields: dict[str, Any]) -> None:
    check_alike(llama, config, {"task_type": "CAUSAL_LM", **fields})


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        *(
            ("C3AConfig", {"block_size": 4, "init_weights": init})
            for init in ("gaussian", "kaiming_uniform", "xavier_uniform")
        ),
        ("VBLoRAConfig", {"num_vectors": 8, "vector_length": 4}),
    ],
    ids=str,
)
def test_so_do_named_distributions_and_a_bank_that_each_layer_draws(config: str, fields: dict[str, Any]) -> None:
    check_alike(llama, config, fields | LINEAR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_in_other_dtypes_too(dtype: torch.dtype, autocast: bool) -> None:
    fields = {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    check_alike(lambda: llama(dtype=dtype), "LoraConfig", fields, autocast_adapter_dtype=autocast)
    check_alike(lambda: llama(dtype=dtype), "LoHaConfig", {"r": 4, **LINEAR}, autocast_adapter_dtype=autocast)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa", "olora", "eva", "mica"], ids=str)
def test_every_init_of_lora(init: Any) -> None:
    targets = ["q_proj", "embed_tokens"] if init in (True, False, "gaussian", "eva", "mica") else ["q_proj", "v_proj"]
    check_alike(llama, "LoraConfig", {"r": 4, "target_modules": targets, "init_lora_weights": init})


class Kinds(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.line, self.head = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.one, self.two, self.three = nn.Conv1d(8, 6, 3), nn.Conv2d(6, 8, 3, groups=2), nn.Conv3d(4, 6, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = Experts()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 6))


@pytest.mark.parametrize("init", [True, False, "gaussian"], ids=str)
def test_every_kind_of_layer(init: Any) -> None:
    layers = ["table", "line", "one", "two", "three", "attention"]
    fields = {"target_modules": layers, "target_parameters": ["experts.weight"], "modules_to_save": ["head"]}
    check_alike(Kinds, "LoraConfig", {"r": 4, "init_lora_weights": init, **fields})
    check_alike(gpt2, "LoraConfig", {"r": 4, "init_lora_weights": init, "target_modules": ["c_attn", "c_proj"]})


def tied() -> Any:
    model = llama(tie_word_embeddings=True)
    model.tie_weights()
    return model


@pytest.mark.parametrize("init", [True, False, "gaussian"], ids=str)
def test_tied_layers(init: Any) -> None:
    fields = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    check_alike(tied, "LoraConfig", {"r": 4, "init_lora_weights": init, **fields})


@pytest.mark.parametrize("targets", [["q_proj"], ["attention"]], ids=str)
def test_a_second_adapter(targets: list[str]) -> None:
    made = []
    for library in (nbpeft, peft):
        base = Kinds() if targets == ["attention"] else llama()
        torch.manual_seed(5)
        model = library.get_peft_model(base, library.LoraConfig(r=4, target_modules=targets))
        model.add_adapter("second", library.LoraConfig(r=2, target_modules=targets))
        state = torch.get_rng_state()
        made.append((library.get_peft_model_state_dict(model, adapter_name="second"), state))
    (ours, state), (theirs, state_of_peft) = made
    assert torch.equal(state, state_of_peft) and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_new_modules_draw() -> None:
    for module in (nn.Linear(7, 5), nn.Conv2d(6, 4, 3, groups=2), nn.Conv1d(3, 4, 2)):
        torch.manual_seed(3)
        module.reset_parameters()
        state, weight = torch.get_rng_state(), module.weight.detach()
        torch.manual_seed(3)
        assert torch.equal(drawn(weight.shape, linear_, torch.device("cpu"), torch.float32), weight)
        assert module.bias is not None
        skip_linear(torch.device("cpu"), module.bias.shape)
        assert torch.equal(torch.get_rng_state(), state)


def test_no_values_no_draws() -> None:
    before = torch.get_rng_state()
    meta = torch.device("meta")
    assert drawn((3, 4), Tensor.normal_, meta, torch.float16).is_meta
    skip_linear(meta, (3, 4))
    with meta:
        base = nn.Sequential(nn.Linear(4, 4))
    get_peft_model(base, nbpeft.LoraConfig(r=2, target_modules=["0"]))
    assert torch.equal(torch.get_rng_state(), before)
    with meta:
        made = drawn((3, 4), Tensor.normal_, torch.device("cpu"), torch.float32)
    assert not made.is_meta
