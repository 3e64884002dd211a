"""nn.MultiheadAttention and the fast path of torch's encoder layers, beside PEFT."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import nbpeft
from nbpeft.errors import AdapterError, ConfigError, TargetError
from tests.closeness import assert_close, differ
from tests.tiny_models import same_state, state

EMBED = 16
MASK = torch.ones(5, 5).triu(1).bool()
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


class Net(nn.Module):
    """One attention over its own input, a linear layer behind it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(EMBED, 4, **{"batch_first": True, **options})
        self.lin = nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        output, weights = self.attn(x, x, x, **options)
        return self.lin(output) if weights is None else self.lin(output) + weights.mean()


def base(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options).eval()


def adapt(library: Any, model: nn.Module, name: str = "default", seed: int = 1, **changes: Any) -> Any:
    settings = {"target_modules": ["attn"], "r": 4, "lora_alpha": 8, "init_lora_weights": False, **changes}
    torch.manual_seed(seed)
    return library.get_peft_model(copy.deepcopy(model), library.LoraConfig(**settings), name).eval()


def pair(model: nn.Module | None = None, **changes: Any) -> tuple[Any, Any]:
    """PEFT's model and ours, with the same tensors."""
    model = base() if model is None else model
    theirs, ours = adapt(peft, model, **changes), adapt(nbpeft, model, **changes)
    nbpeft.set_peft_model_state_dict(ours, dict(peft.get_peft_model_state_dict(theirs)))
    return theirs, ours


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, EMBED)), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_lora_weights": True},
        {"init_lora_weights": "gaussian", "use_rslora": True},
        {"rank_pattern": {"attn": 2}, "alpha_pattern": {"attn": 6}, "target_modules": ["attn", "lin"]},
    ],
    ids=str,
)
def test_the_same_config_makes_the_same_adapter_as_in_peft(changes: dict[str, Any]) -> None:
    theirs, ours = pair(**changes)
    assert same_state(dict(peft.get_peft_model_state_dict(theirs)), nbpeft.get_peft_model_state_dict(ours))
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert {n for n, p in theirs.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }
    assert_close(theirs(rows()), ours(rows()))
    assert type(ours.base_model.model.attn)._get_name(ours.base_model.model.attn) == "lora.MultiheadAttention"


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {"need_weights": False}),
        ({}, {"attn_mask": MASK, "is_causal": True, "need_weights": False}),
        ({}, {"key_padding_mask": PADDING, "average_attn_weights": False}),
        ({"batch_first": False}, {}),
        ({"add_bias_kv": True, "add_zero_attn": True}, {}),
        ({"bias": False}, {}),
        ({"kdim": EMBED, "vdim": EMBED}, {}),
    ],
    ids=str,
)
def test_every_way_to_call_it_gives_what_peft_gives(options: dict[str, Any], call: dict[str, Any]) -> None:
    model = base(**options)
    theirs, ours = pair(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, expected = ours(rows(), **call), theirs(rows(), **call)
            assert_close(found, expected, equal_nan=True)
            assert differ(found, model(rows(), **call))
            with ours.disable_adapter():
                assert_close(ours(rows(), **call), model(rows(), **call), equal_nan=True)


def test_files_go_both_ways(tmp_path: Path) -> None:
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert_close(nbpeft.PeftModel.from_pretrained(base(), str(tmp_path / "theirs")).eval()(rows()), theirs(rows()))
    assert_close(peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()(rows()), ours(rows()))


def test_training_is_that_of_peft() -> None:
    """With AdamW: PEFT's gradients at ``out_proj`` are half of what they should be, which Adam does not see."""
    theirs, ours = pair(init_lora_weights=True)
    losses: list[list[float]] = []
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(8):
            loss = model(rows()).square().mean()
            losses[-1].append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    steps = 8 * 3 * 4  # four products, three times as many with the gradients, in each of eight steps
    assert_close(losses[0], losses[1], depth=steps)
    assert losses[0][-1] < 0.99 * losses[0][0]
    assert_close(theirs.eval()(rows()), ours.eval()(rows()), depth=steps)


def test_gradients_are_those_of_the_merged_weights() -> None:
    model = base()
    ours = adapt(nbpeft, model)
    ours(rows()).square().sum().backward()
    attention = ours.base_model.model.attn
    inner = attention.get_base_layer().out_proj
    plain = copy.deepcopy(model)
    factors = [p.detach().clone().requires_grad_() for layer in (attention, inner) for p in layer_factors(layer)]
    own_A, own_B, out_A, out_B = factors
    weights = {
        "attn.in_proj_weight": model.attn.in_proj_weight + 2 * own_B @ own_A,
        "attn.out_proj.weight": model.attn.out_proj.weight + 4 * out_B @ out_A,
    }
    torch.func.functional_call(plain, weights, (rows(),)).square().sum().backward()
    for mine, expected in zip([*layer_factors(attention), *layer_factors(inner)], factors, strict=True):
        assert mine.grad is not None and expected.grad is not None
        assert_close(mine.grad, expected.grad)


def test_what_reads_the_weight_of_the_inner_layer_is_given_the_frozen_one() -> None:
    for model in pair():
        attention = model.base_model.model.attn
        inner = attention.base_layer.out_proj
        assert attention.out_proj is inner.get_base_layer() and not hasattr(attention.out_proj, "lora_A")
        assert attention.in_proj_weight.shape == (3 * EMBED, EMBED)


def layer_factors(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def test_merging_and_unmerging_keep_every_bit() -> None:
    theirs, ours = pair()
    before, expected = state(ours), ours(rows())
    ours.merge_adapter(safe_merge=True)
    assert_close(ours(rows()), expected)
    ours.unmerge_adapter()
    assert same_state(before, state(ours))
    merged = ours.merge_and_unload()
    assert_close(merged(rows()), expected)
    assert_close(merged(rows()), theirs.merge_and_unload()(rows()))
    assert merged.state_dict().keys() == base().state_dict().keys()
    assert type(merged.attn) is nn.MultiheadAttention


def test_several_adapters_switch_and_add_up_as_in_peft() -> None:
    theirs, ours = pair()
    settings = {"target_modules": ["attn"], "r": 2, "lora_alpha": 3, "init_lora_weights": False}
    for library, model in ((peft, theirs), (nbpeft, ours)):
        model.add_adapter("other", library.LoraConfig(**settings))
        model.set_adapter("other")
    nbpeft.set_peft_model_state_dict(ours, dict(peft.get_peft_model_state_dict(theirs, adapter_name="other")), "other")
    assert_close(theirs(rows()), ours(rows()))
    alone = ours(rows())
    ours.base_model.set_adapter(["default", "other"])
    together = ours(rows())
    ours.merge_adapter()
    assert_close(ours(rows()), together)
    ours.unmerge_adapter()
    ours.delete_adapter("default")
    assert torch.equal(ours(rows()), alone)
    assert same_state(base().state_dict(), ours.unload().state_dict())


@pytest.mark.parametrize("way", ["linear", "cat", "svd"])
def test_combined_adapters_are_those_of_peft(way: str) -> None:
    theirs, ours = pair()
    for library, model in ((peft, theirs), (nbpeft, ours)):
        settings = {"target_modules": ["attn"], "r": 4, "lora_alpha": 3, "init_lora_weights": False}
        model.add_adapter("other", library.LoraConfig(**settings))
    nbpeft.set_peft_model_state_dict(ours, dict(peft.get_peft_model_state_dict(theirs, adapter_name="other")), "other")
    for model in (theirs, ours):
        model.add_weighted_adapter(["default", "other"], [0.6, 0.4], "both", combination_type=way)
        model.set_adapter("both")
    assert_close(theirs(rows()), ours(rows()))


def test_what_cannot_be_adapted_is_refused_before_anything_changes() -> None:
    apart = base(kdim=8, vdim=8)
    with pytest.raises(ValueError, match="Only same embed for query/key/value"):
        adapt(peft, apart)
    refused: list[tuple[nn.Module, Any, str]] = [
        (apart, nbpeft.LoraConfig(target_modules=["attn"]), "keys have 8 features and its values 8, its queries 16"),
        (base(), nbpeft.LoraConfig(target_modules=["attn"], use_dora=True), "DoRA does not work there"),
        (base(), nbpeft.LoraConfig(target_modules=["attn"], lora_bias=True), "lora_bias=True does not work"),
        (base(), nbpeft.LoraConfig(target_modules=["attn"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (base(), nbpeft.LoHaConfig(target_modules=["attn"]), "LoHa does not work there"),
        (base(), nbpeft.LoraConfig(target_parameters=["attn.out_proj.weight"]), "target that as a module"),
    ]
    for model, config, message in refused:
        before = state(model)
        with pytest.raises((TargetError, ConfigError), match=message) as error:
            nbpeft.get_peft_model(model, config)
        assert "\n" not in str(error.value) and same_state(before, state(model))
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_mixed_batch_is_refused_as_in_peft() -> None:
    for model, error in zip(pair(), (TypeError, AdapterError), strict=True):
        call = model.base_model.model.attn if error is TypeError else model
        inputs = (rows(),) * 3 if error is TypeError else (rows(),)
        with pytest.raises(error, match=r"lora\.MultiheadAttention does not support mixed adapter batches"):
            call(*inputs, adapter_names=["default", "__base__"])


def test_dropout_does_not_act_there_as_in_peft_but_is_named() -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.5 does not act at attn"):
        theirs, ours = pair(lora_dropout=0.5)
    assert_close(ours.train()(rows()), theirs.train()(rows()))


def test_an_adapter_on_its_out_proj_alone_is_kept_and_named() -> None:
    """PEFT trains such factors, too, and says nothing; they stay as they are."""
    with pytest.warns(UserWarning, match="adapter at attn.out_proj has no effect: .* target attn instead"):
        ours = adapt(nbpeft, base(), target_modules=["out_proj", "lin"])
    assert_close(ours(rows()), adapt(peft, base(), target_modules=["out_proj", "lin"])(rows()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = adapt(nbpeft, base(), target_modules=["attn", "out_proj"])
    assert_close(both(rows()), adapt(nbpeft, base())(rows()))


@torch.no_grad()
def test_its_out_proj_can_be_called_by_itself() -> None:
    layer = adapt(nbpeft, base()).manager.layers["attn.out_proj"]
    inner = layer.get_base_layer()
    expected = nn.functional.linear(rows(), inner.weight + layer.get_delta_weight("default"), inner.bias)
    assert_close(layer(rows()), expected)
    assert differ(layer(rows()), inner(rows()))


def test_half_precision_copies_and_pickles() -> None:
    theirs, ours = pair(base().to(torch.bfloat16))
    x = rows().to(torch.bfloat16)
    assert ours(x).dtype == torch.bfloat16
    assert_close(theirs(x), ours(x), depth=4)
    ours = adapt(nbpeft, base())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(rows()), ours(rows()))


# The fast path of torch's encoder layers


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval()


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"], ["1.linear2"], ["self_attn", "linear1", "linear2"]])
def test_adapters_act_also_where_torch_reads_weights_past_them(targets: list[str]) -> None:
    model = encoder()
    ours = adapt(nbpeft, model, target_modules=targets)
    padding = {"src_key_padding_mask": PADDING}
    expected = [ours(rows()).detach(), ours(rows(), **padding).detach()]
    with torch.no_grad():
        found = [ours(rows()), ours(rows(), **padding)]
        plain = model(rows())
    real = ~PADDING
    assert_close(found[0], expected[0])
    assert_close(found[1][real], expected[1][real])
    assert differ(found[0], plain)
    merged = copy.deepcopy(ours).merge_and_unload()
    with torch.no_grad():
        assert_close(merged(rows()), expected[0])
        assert_close(merged(rows(), **padding)[real], expected[1][real])


def test_peft_leaves_adapters_of_linear_layers_out_there() -> None:
    theirs, ours = pair(encoder(), target_modules=["linear1"])
    assert_close(theirs.eval()(rows()), encoder()(rows()))
    assert differ(ours.eval()(rows()), encoder()(rows()))
    assert_close(theirs.train()(rows()), ours.train()(rows()))
    assert_close(ours.eval()(rows()), theirs.train()(rows()))


def test_the_fast_path_comes_back_when_the_adapters_are_gone() -> None:
    model = encoder()
    before = [len(layer._forward_pre_hooks) for layer in model.layers]
    ours = nbpeft.get_peft_model(model, nbpeft.LoraConfig(target_modules=["0.linear1"]))
    assert not model.use_nested_tensor and len(model.layers[0]._forward_pre_hooks) == 1
    assert not model.layers[1]._forward_pre_hooks
    ours.unload()
    assert model.use_nested_tensor and [len(layer._forward_pre_hooks) for layer in model.layers] == before


def test_separate_projections_are_adapted_as_parameters_as_in_peft(tmp_path: Path) -> None:
    names = ["attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"]
    settings: dict[str, Any] = {"r": 4, "target_modules": [], "target_parameters": names, "init_lora_weights": False}
    apart, inputs = base(kdim=8, vdim=12), (torch.randn(2, 3, 16), torch.randn(2, 5, 8), torch.randn(2, 5, 12))
    theirs = peft.get_peft_model(copy.deepcopy(apart), peft.LoraConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    ours = nbpeft.PeftModel.from_pretrained(copy.deepcopy(apart), tmp_path, is_trainable=True).eval()
    attentions = [model.base_model.model.attn for model in (theirs, ours)]
    outputs = [attention(*inputs)[0] for attention in attentions]
    assert_close(*outputs)
    assert differ(outputs[1], apart.attn(*inputs)[0])
    for output in outputs:
        output.square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters() if "lora" in name}
    found = {name: parameter.grad for name, parameter in ours.named_parameters() if "lora" in name}
    assert found.keys() == wanted.keys() and len(found) == 6
    for name, gradient in wanted.items():
        assert_close(found[name], gradient)
    assert_close(ours.merge_and_unload().attn(*inputs)[0], outputs[0])


def test_another_config_sets_the_scaling_of_both_its_weights() -> None:
    model = adapt(nbpeft, base())
    config = model.peft_config["default"].copy(alpha_pattern={"attn": 6})
    for path, layer in model.manager.layers.items():
        layer.adapter("default").configure(config, path)
    scalings = {path: layer.adapter("default").scaling for path, layer in model.manager.layers.items()}
    assert scalings == {"attn": 1.5, "attn.out_proj": 1.5}
