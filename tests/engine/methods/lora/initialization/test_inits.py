"""Inits by name, and adapters that start in a part of the base."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import ConfigError
from nbpeft.model import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tests.closeness import assert_close, differ, is_close
from tests.test_matrix import CASES, Net, assert_merged, make, make_plain, randomise
from tests.tiny_models import same_state, state

IN_BASE = ("olora", "pissa", "pissa_niter_6")
LINEAR_KINDS = [kind for kind in CASES if not kind.startswith(("embedding", "conv", "layer-norm"))]

pytestmark = pytest.mark.filterwarnings("ignore:merging into", "ignore:MatMul8bitLt", "ignore::FutureWarning")

in_base = pytest.mark.parametrize("init", IN_BASE)
on_linear = pytest.mark.parametrize("kind", LINEAR_KINDS)


def settings(**more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": ["target"], **more}


def started(kind: str, init: Any, **more: Any) -> tuple[Net, PeftModel]:
    base = make(CASES[kind])
    return base, get_peft_model(base, LoraConfig(**settings(init_lora_weights=init, **more))).eval()


@on_linear
@in_base
def test_starts_at_the_base_and_leaves_its_weights_alone(kind: str, init: str) -> None:
    case = CASES[kind]
    plain = make_plain(case)
    x, before = case.batch(), state(plain)
    expected = plain(x)
    base, model = started(kind, init)
    assert_close(model(x), expected, depth=2, dtype=case.dtype)
    randomise(base)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert differ(model(x), expected)
    assert model.unload() is base
    if not case.quantized:
        assert same_state(before, state(base))


@on_linear
@in_base
def test_merges_unmerges_saves_and_copies(kind: str, init: str, tmp_path: Any) -> None:
    case = CASES[kind]
    base, model = started(kind, init)
    randomise(base)
    x = case.batch()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    model.merge_adapter()
    assert_merged(case, model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert_close(again(x), expected)


@in_base
@pytest.mark.parametrize("other", ["pissa", True])
def test_adapters_add_up_in_any_order(init: str, other: Any) -> None:
    """In peft the second one finds the base without what the first one took."""
    base, model = started("linear", init)
    model.add_adapter("other", LoraConfig(**settings(init_lora_weights=other)))
    randomise(base)
    x = CASES["linear"].batch()
    model.set_adapter("default")
    first = model(x)
    model.set_adapter("other")
    second = model(x)
    with model.disable_adapter():
        plain = model(x)
    model.set_adapter(["other", "default"])
    # The layer is linear, what follows it is not: compare before the tanh.
    together = torch.atanh(model(x))
    assert_close(together, torch.atanh(first) + torch.atanh(second) - torch.atanh(plain))
    model.delete_adapter("other")
    assert_close(model(x), first)


@pytest.mark.parametrize("init", ["olora", "pissa"])
@pytest.mark.parametrize("dora", [False, True])
def test_equal_to_peft_from_the_start_through_a_step(init: str, dora: bool) -> None:
    config = settings(init_lora_weights=init, use_dora=dora)
    ours = get_peft_model(make(CASES["linear"]), LoraConfig(**config))
    theirs = peft.get_peft_model(make(CASES["linear"]), peft.LoraConfig(**config))
    own, given = get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert own.keys() == given.keys()
    for key, value in given.items():
        assert_close(own[key], value, message=key)
    set_peft_model_state_dict(ours, given)
    x = CASES["linear"].batch()
    gradients = []
    for model in (ours, theirs):
        model.train()(x).square().sum().backward()
        gradients.append({p.shape: p.grad for p in model.parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for shape, gradient in gradients[1].items():
        assert_close(gradients[0][shape], gradient, message=shape)


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_dropout_spares_what_stays_in_the_base(init: str) -> None:
    config = settings(init_lora_weights=init, lora_dropout=1.0)
    ours = get_peft_model(make(CASES["linear"]), LoraConfig(**config)).train()
    theirs = peft.get_peft_model(make(CASES["linear"]), peft.LoraConfig(**config)).train()
    x = CASES["linear"].batch()
    with torch.no_grad():
        assert_close(ours(x), theirs(x))


def test_a_transposed_weight_is_decomposed_the_right_way_round() -> None:
    base = Net(Conv1D(24, 16), nn.Tanh()).eval()
    linear = nn.Linear(16, 24)
    with torch.no_grad():
        linear.weight.copy_(base.target.weight.T)
    turned = get_peft_model(base, LoraConfig(**settings(init_lora_weights="olora")))
    straight = get_peft_model(Net(linear, nn.Tanh()), LoraConfig(**settings(init_lora_weights="olora")))
    own, other = get_peft_model_state_dict(turned), get_peft_model_state_dict(straight)
    assert all(is_close(own[key], other[key]) for key in other)


def test_a_randomized_start_is_found_again_whatever_the_generator_gives() -> None:
    linear = nn.Linear(16, 24)
    first, second = (
        get_peft_model_state_dict(
            get_peft_model(Net(copy.deepcopy(linear), nn.Tanh()), LoraConfig(**settings(init_lora_weights=init)))
        )
        for init in ("pissa_niter_2", "PiSSA_niter_2")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_orthogonal_factors_are_not_zero_but_their_product_is() -> None:
    _, model = started("linear", "orthogonal")
    tensors = get_peft_model_state_dict(model)
    lora_A, lora_B = (next(value for key, value in tensors.items() if name in key) for name in ("lora_A", "lora_B"))
    assert float(lora_A.abs().min()) > 0 and float(lora_B.abs().min()) > 0
    product = lora_B @ lora_A
    assert_close(product, torch.zeros_like(product), depth=1, scale=float(lora_B.abs().max() * lora_A.abs().max()))


def test_names_of_inits_are_read_in_any_case() -> None:
    drawn: list[Tensor] = []
    for init in ("gaussian", "Gaussian"):
        torch.manual_seed(0)
        _, model = started("linear", init)
        drawn.append(get_peft_model_state_dict(model)["base_model.model.target.lora_A.weight"])
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"init_lora_weights": "orthogonal", "r": 3}, "even rank, not 3"),
        ({"init_lora_weights": "olora", "r": 17}, "at most 16 there, not 17"),
        ({"init_lora_weights": "pissa", "rank_pattern": {"target": 99}}, "at most 16 there, not 99"),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, "alpha above 0"),
        ({"init_lora_weights": "pisa"}, "Did you mean 'pissa'"),
        ({"init_lora_weights": "pissa_niter_"}, "is not implemented"),
        ({"init_lora_weights": "mica", "r": 17}, "at most 16 there, not 17"),
        ({"init_lora_weights": "pissa", "lora_bias": True}, "lora_bias=True is supported with"),
    ],
)
def test_what_an_init_cannot_do_is_refused(more: dict[str, Any], message: str) -> None:
    base = make(CASES["linear"])
    before = state(base)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, LoraConfig(**{**settings(), **more}))
    assert same_state(before, state(base))


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
@pytest.mark.parametrize("dora", [False, True])
def test_only_linear_layers_start_so(kind: str, init: str, dora: bool) -> None:
    with pytest.raises(ConfigError, match="linear layers only"):
        get_peft_model(make(CASES[kind]), LoraConfig(**settings(init_lora_weights=init, use_dora=dora)))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Conv2d(4, 6, 3), nn.Conv1d(6, 4, 3, groups=2)


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("targets", [["first"], ["second"], ["first", "second", "third"]], ids=len)
@pytest.mark.filterwarnings("ignore:.*cannot be merged")
def test_a_bias_of_b_starts_as_pefts_and_so_does_what_is_drawn_after_it(init: bool, targets: list[str]) -> None:
    made = []
    for get, config_class in ((peft.get_peft_model, peft.LoraConfig), (get_peft_model, LoraConfig)):
        base = Layers()
        torch.manual_seed(3)
        config = config_class(r=4, target_modules=targets, lora_bias=True, init_lora_weights=init)
        found = {name: value for name, value in get(base, config).named_parameters() if "lora_" in name}
        made.append((found, torch.rand(2)))
    (theirs, after_theirs), (ours, after_ours) = made
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
        assert init or not name.endswith("bias") or value.any()
    assert torch.equal(after_ours, after_theirs)


@pytest.mark.filterwarnings("ignore:.*eva")
def test_before_data_is_seen_eva_starts_as_in_peft_and_so_does_what_is_drawn_after_it() -> None:
    made = []
    for get, config_class in ((peft.get_peft_model, peft.LoraConfig), (get_peft_model, LoraConfig)):
        base = Layers()
        torch.manual_seed(3)
        model = get(base, config_class(r=4, target_modules=["first"], init_lora_weights="eva"))
        made.append(({name: p for name, p in model.named_parameters() if "lora_" in name}, torch.rand(2)))
    (theirs, after_theirs), (ours, after_ours) = made
    assert ours.keys() == theirs.keys() and all(torch.equal(p, theirs[name]) for name, p in ours.items())
    assert torch.equal(after_ours, after_theirs)
