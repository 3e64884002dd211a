"""Adapters of bare parameters, the experts of a mixture, on whole models: equal to PEFT's, and like all others."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.tree.model_tree import bare_names
from nbpeft.engine.wrappers.parameter_layer import AdaptedParameter, wrappers_of
from nbpeft.errors import AdapterError, MergeError
from nbpeft.model import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tests.closeness import assert_close, differ, is_close
from tests.tiny_models import MIXTURES, experts_of, logits, mixture, randomize, same_state, state, tokens

peft = pytest.importorskip("peft")

WAYS = ("eager", "grouped_mm", "batched_mm")
EVERYWHERE = [(name, way) for name in MIXTURES for way in WAYS if name != "llama4" or way == "eager"]


def settings(model_type: str, **changes: Any) -> dict[str, Any]:
    fields = {"r": 4, "lora_alpha": 16, "target_modules": ["o_proj"], "init_lora_weights": False}
    return fields | {"target_parameters": experts_of(model_type)} | changes


def both(model_type: str, way: str = "eager", **changes: Any) -> tuple[Any, Any]:
    """PEFT's model and ours, with the same adapter."""
    base, fields = mixture(model_type, way), settings(model_type, **changes)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)).eval()
    torch.manual_seed(1)
    return theirs, get_peft_model(base, LoraConfig(**fields)).eval()


def adapted(model_type: str = "mixtral", way: str = "eager", **changes: Any) -> Any:
    return get_peft_model(mixture(model_type, way), LoraConfig(**settings(model_type, **changes))).eval()


@pytest.mark.parametrize("model_type", MIXTURES)
def test_names_shapes_and_starting_values_are_those_of_peft(model_type: str) -> None:
    theirs, ours = both(model_type)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == [
        name for name, p in theirs.named_parameters() if p.requires_grad
    ]
    assert same_state(get_peft_model_state_dict(ours), dict(peft.get_peft_model_state_dict(theirs)))
    assert same_state(state(ours), state(theirs))


@pytest.mark.drawn(10)
@pytest.mark.parametrize(("model_type", "way"), EVERYWHERE)
def test_outputs_and_gradients_are_those_of_peft(model_type: str, way: str) -> None:
    theirs, ours = both(model_type, way)
    assert_close(logits(theirs), logits(ours))
    assert differ(logits(ours), logits(ours.unload()))
    theirs, ours = both(model_type, way)
    for model in (theirs, ours):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and all(is_close(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_eight_training_steps_are_those_of_peft(model_type: str) -> None:
    losses: list[list[float]] = []
    theirs, ours = both(model_type, init_lora_weights=True)
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        losses.append([])
        for _ in range(8):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert_close(losses[0], losses[1])
    assert losses[1][-1] < losses[1][0] - 0.05


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4"])
def test_files_go_both_ways_in_any_order_of_adapters(model_type: str, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3}}
    ours = adapted(model_type, **patterns)
    ours.add_adapter("other", LoraConfig(**settings(model_type, **patterns)))
    expected = {}
    for name in ("other", "default"):
        ours.set_adapter(name)
        expected[name] = logits(ours)
    ours.save_pretrained(str(tmp_path / "ours"))
    theirs = peft.PeftModel.from_pretrained(mixture(model_type), str(tmp_path / "ours")).eval()
    theirs.load_adapter(str(tmp_path / "ours" / "other"), "other")
    assert_close(logits(theirs), expected["default"])
    theirs.set_adapter("other")
    assert_close(logits(theirs), expected["other"])
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = PeftModel.from_pretrained(mixture(model_type), str(tmp_path / "theirs" / "other"), "other").eval()
    result = again.load_adapter(str(tmp_path / "theirs"), "default")
    assert torch.equal(logits(again), expected["other"]) and not result.missing_keys
    again.set_adapter("default")
    assert torch.equal(logits(again), expected["default"])


@pytest.mark.parametrize("model_type", MIXTURES)
def test_merging_writes_the_parameter_and_unmerging_puts_it_back(model_type: str) -> None:
    base = state(mixture(model_type))
    model = adapted(model_type)
    expected, own = logits(model), bare_names(model.get_base_model())
    model.merge_adapter()
    assert_close(logits(model), expected)
    with model.disable_adapter():
        assert differ(logits(model), expected)
    model.unmerge_adapter()
    back = {own(name): value for name, value in state(model.get_base_model()).items() if own(name) is not None}
    assert same_state(back, base)
    merged = model.merge_and_unload()
    assert_close(logits(merged), expected)
    assert state(merged).keys() == base.keys()


def test_several_adapters_are_switched_scaled_merged_and_deleted() -> None:
    model, plain = adapted(), logits(mixture("mixtral"))
    model.add_adapter("other", LoraConfig(**settings("mixtral")))
    randomize(model, "other", seed=5, scale=0.1)
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    model.set_adapter(["default", "other"])
    together = logits(model)
    model.manager.set_scale("other", 0.0)
    assert_close(logits(model), first)
    assert differ(first, second) and differ(together, first)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.manager.set_scale("other", 1.0)
    model.merge_adapter()
    assert_close(logits(model), together)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    model.delete_adapter("other")
    assert torch.equal(logits(model), plain)
    assert not any(isinstance(module, AdaptedParameter) for module in model.modules())


def test_copies_and_pickles_compute_the_same_with_parameters_of_their_own() -> None:
    model = adapted("gpt_oss")
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        twin.merge_and_unload()
    assert torch.equal(logits(model), expected)


def test_threads_with_and_without_adapters_do_not_see_each_other() -> None:
    model, plain = adapted("qwen3_moe"), logits(mixture("qwen3_moe"))
    expected, wrong = logits(model), []

    def call(enabled: bool) -> None:
        for _ in range(12):
            if enabled:
                wrong.append(torch.equal(logits(model), expected))
                continue
            with model.disable_adapter():
                wrong.append(torch.equal(logits(model), plain))

    threads = [threading.Thread(target=call, args=(enabled,)) for enabled in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [True] * 24


def test_an_adapter_that_cannot_be_added_leaves_the_model_as_it_was() -> None:
    model = adapted()
    before, expected = state(model), logits(model)
    with pytest.raises(ValueError, match=r"all adapters must target the same set of parameters of model\.layers"):
        model.add_adapter("other", LoraConfig(**settings("mixtral", target_parameters=["experts.down_proj"])))
    assert model.manager.names == ("default",) and same_state(state(model), before)
    assert torch.equal(logits(model), expected)


def test_an_adapter_takes_the_place_of_one_with_other_parameters() -> None:
    model = adapted()
    model.manager.add(
        "default", LoraConfig(**settings("mixtral", target_parameters=["experts.down_proj"])), replace=True
    )
    wrapped = [module for module in model.modules() if isinstance(module, AdaptedParameter)]
    assert {layer.parameter_name for layer in wrapped} == {"down_proj"} and len(wrapped) == 2
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(mixture("mixtral")))


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_a_batch_have_adapters_of_their_own(way: str) -> None:
    model, ids = adapted("qwen3_moe", way), tokens(rows=4)
    model.add_adapter("other", LoraConfig(**settings("qwen3_moe")))
    names = ["default", "__base__", "other", "other"]
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=names).logits
    with model.disable_adapter():
        expected = {"__base__": logits(model, ids)}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model, ids)
    assert all(is_close(found[row], expected[name][row]) for row, name in enumerate(names))


def test_rows_that_a_module_mixes_cannot_have_adapters_of_their_own() -> None:
    model = adapted("llama4")
    with pytest.raises(AdapterError, match="does not support mixed adapter batches yet in a Llama4TextExperts"):
        model(input_ids=tokens(), adapter_names=["default", "__base__"])
    assert torch.isfinite(logits(model)).all()


def test_adapters_of_parameters_cannot_be_combined() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"add_weighted_adapter does not support targeting nn\.Parameter"):
        model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "mean")
    assert model.manager.names == ("default",)


def test_a_wrapper_looks_like_the_one_of_peft() -> None:
    model = adapted("gpt_oss")
    experts = model.get_base_model().model.layers[0].mlp.experts
    outer, inner = wrappers_of(experts)
    assert repr(outer).startswith("lora.ParamWrapper(") and "parameter_name='down_proj'" in repr(outer)
    assert (outer.num_experts, outer.r["default"], outer.scaling["default"]) == (4, 4, 4.0)
    assert outer.get_base_layer() is inner.get_base_layer() and outer.get_param() is outer.get_base_layer().down_proj
    assert (inner.in_features, inner.out_features) == (32, 96)
    delta = inner.get_delta_weight("default")
    outer.get_base_layer().gate_up_proj.data += delta
    inner.set_adapter([])
    assert delta.shape == (4, 32, 96) and experts.gate_up_proj is outer.get_base_layer().gate_up_proj


class Scaled(nn.Module):
    """A module that does more with its parameter than to multiply by it, and calls a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.inner = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        norm = self.weight.norm(dim=1, keepdim=True)
        return self.inner(x @ (self.weight / norm).T)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.scaled(x)
        return result


def test_any_module_computes_with_the_sum_where_its_forward_is_not_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 8)
    fields: dict[str, Any] = {"r": 2, "target_modules": ["inner"], "target_parameters": ["scaled.weight"]}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**fields, init_lora_weights=False))
    torch.manual_seed(1)
    ours = get_peft_model(copy.deepcopy(net), LoraConfig(**fields, init_lora_weights=False))
    ours.load_state_dict(theirs.state_dict())
    assert_close(theirs(x), ours(x))
    assert differ(ours(x), net(x))
    ours.save_pretrained(str(tmp_path))
    assert same_state(state(peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path))), state(theirs))
    ours.train()(x).sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def test_merged_weights_that_are_not_finite_are_refused() -> None:
    model = adapted()
    with torch.no_grad():
        model.manager.parameters("default")[-1].fill_(float("nan"))
    before = state(model.get_base_model())
    with pytest.raises(MergeError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items() if name in before)


class Pair(nn.Module):
    """Multiplies two inputs by one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y) @ self.matrix


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(x, x))  # type: ignore[no-any-return]


def of_two_inputs() -> Any:
    shared: dict[str, Any] = {"r": 2, "init_lora_weights": False}
    model = get_peft_model(
        TwoInputs(), LoraConfig(**shared, target_modules=["head"], target_parameters=["pair.matrix"])
    )
    model.add_adapter("head", LoraConfig(**shared, target_modules=["head"]))
    return model.eval()


@torch.no_grad()
def test_rows_of_a_module_with_two_inputs_have_adapters_of_their_own() -> None:
    model, x = of_two_inputs(), torch.randn(2, 4)
    found = model(x, adapter_names=["default", "head"])
    for row, name in enumerate(("default", "head")):
        with model.use(name):
            assert_close(found[row], model(x)[row])


@torch.no_grad()
def test_an_adapter_of_other_layers_adds_nothing_to_a_parameter() -> None:
    model, x = of_two_inputs(), torch.randn(2, 4)
    model.base_model.set_adapter(["default", "head"])
    both = model(x)
    layer = model.manager.layers["pair.matrix"]
    inner = (x + x) @ (layer.base.weight() + layer.adapter("default").delta_weight(layer.base.weight(), layer.base))
    assert_close(both, model.base_model.model.head(inner))
