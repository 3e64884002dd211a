"""(IA)³ in every place of the product, against peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import nbpeft
from nbpeft.errors import AdapterError, ConfigError, HotSwapError
from nbpeft.memory import forecast
from nbpeft.model import AdapterPool, PeftModel, get_peft_model, hotswap_adapter
from nbpeft.session import Session
from tests.closeness import assert_close
from tests.tiny_models import adapted, gpt2, llama, logits, tokens


def ia3(name: str = "default", base: Any = None, seed: int = 1, **fields: Any) -> PeftModel:
    """A model with vectors that are not ones."""
    model = get_peft_model(base if base is not None else llama(), nbpeft.IA3Config(**fields), name)
    draw(model, name, seed)
    return model.eval()


def draw(model: PeftModel, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for vector in model.manager.parameters(name):
            vector.copy_(1 + 0.3 * torch.randn(vector.shape, generator=generator))


def folder_of(path: Path, seed: int) -> Path:
    ia3(seed=seed).save_pretrained(path)
    return path


@pytest.mark.parametrize("build", [llama, gpt2])
def test_defaults_are_those_of_peft_and_files_go_both_ways(build: Any, tmp_path: Path) -> None:
    ours, theirs = ia3(base=build()), peft.get_peft_model(build(), peft.IA3Config())
    mine = {name: (tuple(value.shape)) for name, value in nbpeft.get_peft_model_state_dict(ours).items()}
    assert mine == {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(theirs).items()}
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    assert_close(logits(loaded), logits(ours))
    loaded.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(build(), tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours))
    assert again.peft_config["default"].feedforward_modules == loaded.peft_config["default"].feedforward_modules


@pytest.mark.parametrize(
    ("fields", "inputs"),
    [
        ({"target_modules": ["k_proj"]}, 0),
        ({"target_modules": "all-linear"}, 2),
        ({"target_modules": "all-linear", "feedforward_modules": ["down_proj", "up_proj"]}, 4),
        ({"target_modules": ["q_proj", "down_proj"]}, 2),
    ],
)
def test_feed_forward_layers_are_among_the_targets_and_folders_load_again(
    fields: dict[str, Any], inputs: int, tmp_path: Path
) -> None:
    model = ia3(**fields)
    config = model.peft_config["default"]
    assert config.feedforward_modules <= config.target_modules
    vectors = [layer.adapters["default"].get_parameter("ia3_l") for layer in model.manager.layers.values()]
    assert sum(vector.shape[0] == 1 for vector in vectors) == inputs
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    assert_close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(model))


def test_it_starts_at_the_base_trains_and_merges() -> None:
    base = llama()
    before = logits(base)
    model = get_peft_model(base, nbpeft.IA3Config())
    assert torch.equal(logits(model), before)
    model.train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(vector.grad is not None and vector.grad.any() for vector in model.manager.parameters("default"))
    draw(model.eval(), "default", 1)
    expected = logits(model)
    model.merge_adapter()
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert_close(logits(model.merge_and_unload()), expected)


def test_alone_it_costs_no_second_product() -> None:
    model, calls = ia3(), 0
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    kind = layer.base.kind

    class Counting(type(kind)):  # type: ignore[misc]
        def apply(self, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return super().apply(*arguments)

    layer.base.kind = Counting()
    logits(model)
    assert calls == 0
    model.add_adapter("other", nbpeft.LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    model.set_adapter(["default", "other"])
    logits(model)
    assert calls == 1


def test_beside_low_rank_rows_switches_and_scales() -> None:
    model = ia3("ia3")
    model.add_adapter("lora", nbpeft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    ids = tokens(rows=3)
    alone = {}
    for name in ("ia3", "lora"):
        with model.use(name):
            alone[name] = logits(model, ids)
    with model.disable_adapter():
        alone["__base__"] = logits(model, ids)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["lora", "ia3", "__base__"]).logits
    for row, name in enumerate(("lora", "ia3", "__base__")):
        assert_close(mixed[row], alone[name][row])
    session = Session()
    session.register(model, name="model")
    session.scale("ia3", 0.0)
    assert_close(logits(model, ids), alone["__base__"])
    session.scale("ia3", 1.0)
    assert_close(logits(model, ids), alone["ia3"])
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    with pytest.warns(UserWarning, match="a scale of 2 has no effect on adapter 'ia3'"):
        layer.scale_layer(2.0)  # as diffusers' loop over layers does
    assert_close(logits(model, ids), alone["ia3"])
    assert not isinstance(layer, nbpeft.LoraLayer)
    assert isinstance(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj"), nbpeft.LoraLayer)


def test_combining_its_own_kind_and_no_other() -> None:
    model = ia3("a")
    model.add_adapter("b", nbpeft.IA3Config())
    draw(model, "b", 2)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "peft")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.5], "exact", combination_type="exact")
    first, second = (model.manager.weights(name).adapters for name in ("a", "b"))
    for path, made in model.manager.weights("peft").adapters.items():
        assert_close(made["ia3_l"], 0.7 * first[path]["ia3_l"] + 0.3 * second[path]["ia3_l"])
    for path, made in model.manager.weights("exact").adapters.items():
        wanted = 1 + 0.7 * (first[path]["ia3_l"] - 1) + 0.5 * (second[path]["ia3_l"] - 1)
        assert_close(made["ia3_l"], wanted)
    with pytest.raises(ConfigError, match=r".IA.³ has no combination_type 'svd'; choose from exact, linear"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="svd")
    model.add_adapter("lora", nbpeft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"'a' is .IA.³ and 'lora' is LoRA: only adapters of the same method"):
        model.add_weighted_adapter(["a", "lora"], [1.0, 1.0], "c", combination_type="exact")


def test_a_combination_keeps_the_copies_and_the_orientation_of_its_parts() -> None:
    names = {"target_modules": ["q_proj", "down_proj"]}
    model = ia3("a", feedforward_modules=["down_proj"], modules_to_save=None, **names)
    pattern, head = r".*\.(q|down)_proj", ["lm_head"]
    model.add_adapter("b", nbpeft.IA3Config(feedforward_modules=pattern, target_modules=["down_proj"]))
    model.add_adapter("c", nbpeft.IA3Config(feedforward_modules=[], target_modules=["q_proj"], modules_to_save=head))
    for seed, name in enumerate("bc"):
        draw(model, name, seed)
    model.add_weighted_adapter(["a", "b", "c"], [0.5, 0.25, 0.25], "all", combination_type="exact")
    config = model.peft_config["all"]
    assert config.modules_to_save == head
    assert {path.rpartition(".")[2] for path in config.feedforward_modules} == {"down_proj"}
    copies = model.manager.copies["lm_head"].modules_to_save
    assert torch.equal(copies["all"].weight, copies["c"].weight)


def test_two_merged_at_once_are_their_sum_with_the_bias_too() -> None:
    base = gpt2()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model = ia3("a", base=base)
    model.add_adapter("b", nbpeft.IA3Config())
    draw(model, "b", 2)
    model.set_adapter(["a", "b"])
    before = logits(model)
    model.merge_adapter()
    assert_close(logits(model), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_hot_swapping_and_pools(tmp_path: Path) -> None:
    folders = {name: folder_of(tmp_path / name, seed) for seed, name in enumerate("ab", start=3)}
    expected = {name: logits(PeftModel.from_pretrained(llama(), folder)) for name, folder in folders.items()}
    model = ia3()
    hotswap_adapter(model, folders["a"], "default")
    assert torch.equal(logits(model), expected["a"])
    adapted().save_pretrained(tmp_path / "lora")
    with pytest.raises(HotSwapError, match=r"'default' is .IA.³ and cannot be swapped for LoRA"):
        hotswap_adapter(model, tmp_path / "lora", "default")
    assert torch.equal(logits(model), expected["a"])
    size = (folders["a"] / "adapter_model.safetensors").stat().st_size / 1e6
    pool = AdapterPool(llama(), 1.4 * size, adapters=folders)
    for name in ("a", "b", "a"):
        pool.set_adapter(name)
        assert_close(logits(pool.model), expected[name])


def test_forecast_preview_panel_card_and_script(tmp_path: Path) -> None:
    config = nbpeft.IA3Config(feedforward_modules=["down_proj"], target_modules=["k_proj", "v_proj", "down_proj"])
    part = next(part for part in forecast(llama(), config, batch_size=1, max_length=8).parts if part.name == "adapters")
    model = ia3()
    count = sum(vector.numel() for vector in model.manager.parameters("default"))
    assert part.byte_count == 4 * count
    session = Session()
    preview = session.preview(llama(), {"peft_type": "ia3"})
    assert str(count) in f"{preview}".replace(",", "") and "(IA)³" in str(preview)
    base = llama()
    result = session.add(base, {"peft_type": "IA3"}, name="scales")
    assert result.adapter.method == "(IA)³" and result.adapter.summary == {"vectors": "inputs and outputs"}
    assert "(IA)³" in str(session.state.models[0].adapters[0].method)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "(IA)³" in card and "`feedforward_modules`" in card and "lora" not in card
    script = nbpeft.training.export_script(
        model, tmp_path / "train.py", [{"input_ids": [1, 2, 3]}], base="somebody/base"
    )
    assert "nbpeft.IA3Config(**CONFIG)" in script.script.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "IA3"


def test_what_is_impossible_is_one_line() -> None:
    with pytest.raises(ConfigError, match="feedforward_modules should be a subset of target_modules, which lack c"):
        nbpeft.IA3Config(target_modules=["a", "b"], feedforward_modules=["c"])
    with pytest.raises(ConfigError, match="Please specify `feedforward_modules`"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), nbpeft.IA3Config(target_modules=["0"]))
    with pytest.raises(ConfigError, match=r"embed_tokens: .IA.³ does not work on an embedding; exclude it"):
        ia3(target_modules=["embed_tokens"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_not_combined(value: float) -> None:
    model = ia3("a", target_modules=["q_proj"])
    model.add_adapter("b", nbpeft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    layer = next(iter(model.manager.layers.values()))
    with torch.no_grad():
        layer.adapter("b").get_parameter("ia3_l")[1] = value
    with pytest.raises(AdapterError, match=r"no finite vector at model\.layers\.0\.self_attn\.q_proj"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    assert list(model.peft_config) == ["a", "b"] and list(layer.adapters) == ["a", "b"]
