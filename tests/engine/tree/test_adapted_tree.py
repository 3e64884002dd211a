"""What somebody does to the module tree of an adapted model by hand is what holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nbpeft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from nbpeft.engine.runtime.manager import require_manager
from nbpeft.engine.runtime.snapshots import restore, snapshot
from nbpeft.engine.tree import adapted_tree
from nbpeft.engine.tree.adapted_tree import AdaptedTree
from nbpeft.engine.tree.model_tree import walk
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError
from nbpeft.model import get_peft_model_state_dict
from nbpeft.peft_api.layers import of_method
from tests.closeness import assert_close
from tests.tiny_models import adapted, config, llama, logits

LoraLayer = of_method("lora", "LoraLayer")


def net() -> Any:
    """Two blocks of linear layers."""
    torch.manual_seed(0)
    blocks = {"one": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "two": nn.Sequential(nn.Linear(4, 4))}
    return nn.ModuleDict(blocks)


def output(model: Any) -> Any:
    with torch.no_grad():
        return model["two"](model["one"](torch.ones(1, 4)))


def lora(rank: int = 2, targets: Any = "all-linear") -> LoraConfig:
    return LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)


def adapted_net(*names: str) -> Any:
    model = net()
    for name in names:
        inject_adapter_in_model(lora(), model, name)
    return model


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, AdaptedLayer)]


def put_base_layers_back(model: nn.Module) -> None:
    """As diffusers and others unload."""
    for path, module in list(model.named_modules()):
        if isinstance(module, AdaptedLayer):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.get_base_layer())


def test_base_layers_that_were_put_back_leave_no_adapter() -> None:
    model = adapted_net("x", "y")
    manager, told = require_manager(model), []
    manager.subscribe(lambda: told.append(manager.names))
    put_base_layers_back(model)
    assert (manager.names, manager.layers, manager.active) == ((), {}, ())
    assert model.peft_config == {} and told == [()]
    assert torch.equal(output(model), output(net()))
    inject_adapter_in_model(lora(3), model, "x")
    assert manager.names == manager.active == ("x",)
    assert all(list(layer.r.items()) == [("x", 3)] for layer in layers_of(model))
    assert not torch.equal(output(model), output(net()))


def test_what_was_merged_stays_in_base_layers_that_were_put_back() -> None:
    model = adapted_net("x")
    require_manager(model).merge()
    merged = output(model)
    put_base_layers_back(model)
    assert require_manager(model).merged == ()
    assert torch.equal(output(model), merged)
    inject_adapter_in_model(lora(), model, "x")
    require_manager(model).merge()


def test_a_layer_that_was_replaced_is_no_part_of_its_adapter(tmp_path: Path) -> None:
    model = adapted()
    assert isinstance(model, PeftModel)
    block = model.get_base_model().model.layers[0].self_attn
    block.q_proj = block.q_proj.get_base_layer()
    model.save_pretrained(tmp_path)
    assert not any("layers.0.self_attn.q_proj" in key for key in get_peft_model_state_dict(model))
    assert "model.layers.0.self_attn.q_proj" not in model.manager.layers
    assert model.manager.names == ("default",)


def test_layers_taken_out_for_a_while_have_their_adapter_again() -> None:
    model = adapted_net("x")
    manager, expected = require_manager(model), output(model)
    kept = dict(model["one"]._modules)
    model["one"]._modules.update({name: layer.base_layer for name, layer in kept.items()})
    assert list(manager.layers) == ["two.0"]
    model["one"]._modules.update(kept)
    assert list(manager.layers) == ["one.0", "one.1", "two.0"]
    assert torch.equal(output(model), expected)
    manager.disable()
    assert torch.equal(output(model), output(net()))


def test_a_moved_block_acts_where_it_is_and_is_adapted_there() -> None:
    former, model = net(), net()
    inject_adapter_in_model(lora(targets=["one.0", "one.1"]), former, "x")
    expected = output(former)
    model["one"], former["one"] = former["one"], net()["one"]
    assert require_manager(former).names == ()
    assert torch.equal(output(former), output(net()))
    assert torch.equal(output(model), expected)
    inject_adapter_in_model(lora(3), model, "y")
    manager = require_manager(model)
    assert manager.names == ("x", "y") and manager.active == ("y",)
    manager.activate("x")
    assert torch.equal(output(model), expected)


def test_a_copied_block_has_the_adapters_of_its_model() -> None:
    model = adapted_net("x", "y")
    model["three"] = copy.deepcopy(model["two"])
    manager = require_manager(model)
    assert list(manager.layers) == ["one.0", "one.1", "two.0", "three.0"]
    manager.activate("y")
    assert torch.equal(model["three"](torch.ones(1, 4)), model["two"](torch.ones(1, 4)))
    keys = get_peft_model_state_dict(model, adapter_name="y")
    assert {key.partition(".")[0] for key in keys} == {"one", "two", "three"}


def test_a_part_of_an_adapted_model_is_not_adapted_apart() -> None:
    model = adapted_net("x")
    with pytest.raises(AdapterError, match=r"0 has adapters of another model \('x'\)"):
        inject_adapter_in_model(lora(), model["one"], "y")
    assert require_manager(model).names == ("x",)
    assert all(list(layer.adapters) == ["x"] for layer in layers_of(model))


def test_modules_around_layers_are_no_part_of_their_paths() -> None:
    model = adapted_net("x")
    model["one"] = torch.compile(model["one"], backend="eager")
    assert list(require_manager(model).layers) == ["one.0", "one.1", "two.0"]


def test_prompts_are_gone_with_their_embedding() -> None:
    base: Any = llama()
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    base.model.embed_tokens = nn.Embedding(base.vocab_size, 8)
    assert model.manager.names == ()
    base.model.embed_tokens = llama().model.embed_tokens
    assert torch.equal(logits(base), logits(llama()))


def test_the_last_layer_takes_an_adapter_with_it() -> None:
    model = adapted_net("x", "y")
    manager, layers = require_manager(model), layers_of(model)
    for layer in layers:
        assert "x" in manager.names
        layer.delete_adapter("x")
    assert manager.names == manager.active == ("y",)
    inject_adapter_in_model(lora(), model, "x")
    assert [*manager.names] == ["y", "x"]


def test_another_adapter_acts_on_a_layer_that_lost_the_active_one() -> None:
    model = adapted_net("x", "y")
    manager = require_manager(model)
    manager.activate("y")
    alone = output(model)
    manager.activate("x")
    for layer in layers_of(model):
        with pytest.warns(UserWarning, match="Adapter x was active which is now deleted. Setting active adapter to y"):
            layer.delete_adapter("x")
        assert layer.active_adapters == ["y"]
    assert torch.equal(output(model), alone)


@pytest.mark.parametrize("made", [lora(), LoHaConfig(r=2, target_modules="all-linear")], ids=["lora", "loha"])
def test_a_layer_without_adapters_has_peft_names_without_entries(made: Any) -> None:
    model = net()
    inject_adapter_in_model(made, model, "x")
    layers = layers_of(model)
    names = (*layers[0].adapter_layer_names, *layers[0].other_param_names)
    kind = of_method(made.peft_type.lower(), type(made).__name__.replace("Config", "Layer"))
    title = str(layers[0])
    for layer in layers:
        layer.delete_adapter("x")
    assert "r" in names and title.partition("(")[0] == str(layers[0]).partition("(")[0]
    for layer in layers_of(model):
        assert isinstance(layer, kind)
        for name in (*names, *layer.adapter_layer_names, *layer.other_param_names):
            assert len(getattr(layer, name)) == 0 and "x" not in getattr(layer, name), name
        assert layer.active_adapters == [] and not hasattr(layer, "unheard_of")
    assert torch.equal(output(model), output(net()))
    inject_adapter_in_model(lora(3), model, "x")
    assert all(dict(layer.r) == {"x": 3} for layer in layers_of(model))


def test_a_failing_command_leaves_what_is_known_of_the_tree() -> None:
    model = adapted_net("x")
    manager = require_manager(model)
    with pytest.raises(ZeroDivisionError), manager.transaction():
        inject_adapter_in_model(lora(), model, "y")
        manager.remove("x")
        raise ZeroDivisionError
    assert manager.names == ("x",) and list(manager.layers) == ["one.0", "one.1", "two.0"]
    manager.remove("x")
    assert layers_of(model) == [] and manager.layers == {}


def test_copies_of_a_model_know_their_own_tree() -> None:
    model = adapted_net("x")
    twin = copy.deepcopy(model)
    put_base_layers_back(twin)
    assert require_manager(twin).names == () and require_manager(model).names == ("x",)
    assert require_manager(copy.deepcopy(model)).names == ("x",)


def test_layers_are_listed_in_the_order_of_the_model() -> None:
    model = net()
    inject_adapter_in_model(lora(targets=["one.1", "two.0"]), model, "x")
    inject_adapter_in_model(config(r=2, target_modules=["one.0", "one.1"]), model, "y")
    assert list(require_manager(model).layers) == ["one.0", "one.1", "two.0"]


def taken_out(model: Any) -> dict[Any, dict[str, Any]]:
    """Takes all adapted layers out; returns parent -> name -> layer."""
    layers = {
        parent: {name: child for name, child in parent.named_children() if isinstance(child, AdaptedLayer)}
        for parent in model.modules()
        if not isinstance(parent, AdaptedLayer)
    }
    for parent, own in layers.items():
        for name, layer in own.items():
            setattr(parent, name, layer.get_base_layer())
    return layers


def put_in(layers: dict[Any, dict[str, Any]]) -> None:
    for parent, own in layers.items():
        for name, layer in own.items():
            setattr(parent, name, layer)


def test_adapters_that_come_back_are_what_they_were() -> None:
    model = get_peft_model(llama(), config(init_lora_weights=False)).eval()
    model.add_adapter("second", config(init_lora_weights=False))
    manager = model.manager
    manager.set_scale("default", 0.5)
    manager.unsaved.add("default")
    manager.freeze("second")
    wanted, configs = logits(model), dict(manager.configs)
    layers = taken_out(model)
    assert not [*manager.names] and not torch.equal(logits(model), wanted)
    put_in(layers)
    assert torch.equal(logits(model), wanted)
    assert manager.names == ("default", "second") and manager.active == ("default",)
    assert all(manager.configs[name] is config for name, config in configs.items())
    assert (manager.scale("default"), manager.unsaved, manager.frozen) == (0.5, {"default"}, {"second"})


def test_a_choice_made_meanwhile_stays_when_another_adapter_comes_back() -> None:
    model = adapted_net("x")
    manager, layers = require_manager(model), taken_out(model)
    inject_adapter_in_model(lora(targets=["0"]), model, "y")
    put_in({model["one"]: layers[model["one"]]})
    assert manager.names == ("x", "y") and manager.active == ("y",)


@pytest.mark.parametrize("all_out", [True, False])
def test_layers_that_come_back_merged_can_be_unmerged(all_out: bool) -> None:
    base = llama()
    expected = logits(base.eval())
    model = get_peft_model(base, config(init_lora_weights=False)).eval()
    wanted = logits(model)
    model.merge_adapter()
    layers = taken_out(model)
    if not all_out:
        first = next(parent for parent, own in layers.items() if own)
        put_in({parent: own for parent, own in layers.items() if parent is not first})
        layers = {first: layers[first]}
    logits(model)
    if not all_out:
        model.unmerge_adapter()
    put_in(layers)
    assert model.manager.merged == ("default",)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert_close(logits(model), wanted)
    assert torch.equal(logits(model.unload()), expected)


def test_a_prompt_acts_again_with_its_embedding() -> None:
    base = llama()
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    wanted = logits(model)
    embedding = base.model.embed_tokens
    base.model.embed_tokens = nn.Embedding(base.vocab_size, 8)
    assert model.manager.names == ()
    base.model.embed_tokens = embedding
    assert torch.equal(logits(model), wanted)


def test_a_copy_and_what_comes_back_leave_a_layer_alone_that_was_taken_out() -> None:
    base = llama()
    model = get_peft_model(base, config(init_lora_weights=False)).eval()
    attention = base.model.layers[0].self_attn
    attention.q_proj = attention.q_proj.base_layer
    wanted, count = logits(model), len(model.manager.layers)
    model.manager.copy("default", "copied")
    model.set_adapter("copied")
    assert torch.equal(logits(model), wanted) and len(model.manager.layers) == count
    kept = snapshot(model.manager, "default")
    model.delete_adapter("default")
    restore(model.manager, kept)
    model.set_adapter("default")
    assert torch.equal(logits(model), wanted) and len(model.manager.layers) == count


def test_a_layer_that_is_put_back_in_a_block_is_disabled_at_once() -> None:
    base = llama()
    expected = logits(base.eval())
    model = get_peft_model(base, config(init_lora_weights=False)).eval()
    wanted = logits(base)
    attention = base.model.layers[0].self_attn
    layer = attention.q_proj
    attention.q_proj = layer.base_layer
    with model.disable_adapter():
        attention.q_proj = layer
        assert torch.equal(logits(base), expected)
    assert torch.equal(logits(base), wanted)


def test_what_another_thread_puts_back_while_the_tree_is_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_net("x")
    layer, modules = model["two"][0], model["two"]._modules
    modules["0"] = layer.base_layer

    def walk_and_put_back(root: nn.Module) -> Any:
        yield from walk(root)
        modules["0"] = layer

    monkeypatch.setattr(adapted_tree, "walk", walk_and_put_back)
    assert "two.0" not in require_manager(model).layers
    assert "two.0" in require_manager(model).layers


def test_a_block_asks_the_tree_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, times = adapted(), []
    monkeypatch.setattr(AdaptedTree, "is_current", property(lambda tree: times.append(tree) or True))
    with model.disable_adapter():
        pass
    assert len(times) == 1
