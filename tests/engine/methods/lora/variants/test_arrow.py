"""Arrow and GenKnowSub: each token goes through the adapters that suit it, as in PEFT and where PEFT is not exact."""

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
from nbpeft.engine.methods.lora.variants import arrow
from nbpeft.errors import ConfigError, MergeError, NbpeftError
from nbpeft.model import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from tests.closeness import assert_close, differ, is_close
from tests.tiny_models import llama, logits, same_state, state, tokens

TARGETS = ["q_proj", "down_proj"]
NAMES = ["t0", "t1", "t2", "g0", "g1"]


def draw(model: Any, name: str, seed: int) -> None:
    """Factors with one direction far ahead of the others, so that PEFT's iteration finds it."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (m for m in model.modules() if name in getattr(m, "lora_A", ())):
        for factor in (layer.lora_A[name].weight, layer.lora_B[name].weight):
            factor.data.copy_(0.2 * torch.randn(factor.shape, generator=generator))
        layer.lora_A[name].weight.data[0] *= 10


def saved_expert(folder: Path, seed: int, **changes: Any) -> str:
    model = get_peft_model(llama(), LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **changes}))
    draw(model, "default", seed)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("experts")
    return [saved_expert(folder / name, seed) for seed, name in enumerate(NAMES)]


def ours(experts: list[str], **settings: Any) -> PeftModel:
    return create_arrow_model(llama(), experts[:3], ArrowConfig(**settings), experts[3:])


def both(experts: list[str], **settings: Any) -> tuple[PeftModel, Any]:
    config = peft.tuners.lora.ArrowConfig(**{"rng_seed": 0, **settings})
    return ours(experts, **settings), peft.create_arrow_model(llama(), experts[:3], config, experts[3:]).eval()


@pytest.mark.parametrize("use_gks", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gives_what_peft_gives(experts: list[str], top_k: int, use_gks: bool) -> None:
    mine, theirs = both(experts, top_k=top_k, use_gks=use_gks, router_temperature=0.6)
    assert_close(logits(mine), logits(theirs))
    assert differ(logits(mine), logits(llama()))
    ids = tokens(2, 5)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(mine.generate(input_ids=ids, **options), theirs.generate(input_ids=ids, **options))


@pytest.mark.parametrize("use_gks", [False, True])
def test_adapters_added_later_are_routed_over_as_in_peft(experts: list[str], use_gks: bool) -> None:
    mine, theirs = both(experts, top_k=2, use_gks=use_gks)
    before = logits(mine), logits(theirs)
    for model, config in ((mine, LoraConfig), (theirs, peft.LoraConfig)):
        model.add_adapter("late", config(r=3, lora_alpha=12, target_modules=TARGETS))
        draw(model, "late", 17)
        model.set_adapter("arrow_router")
    assert_close(logits(mine), logits(theirs))
    assert differ(logits(mine), before[0])


def learned(model: Any, steps: int, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    """The first gradients of the adapters that are routed over, and the losses of a training of them."""
    chosen = {name: one for name, one in model.named_parameters() if ".task_" in name}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    optimizer, losses = torch.optim.SGD(chosen.values(), lr=0.05), []
    first: dict[str, Any] = {}
    for _ in range(steps):
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        first = first or {name: one.grad.clone() for name, one in chosen.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return first, losses


@pytest.mark.parametrize("use_gks", [False, True])
def test_adapters_learn_through_it_as_in_peft(experts: list[str], use_gks: bool) -> None:
    mine, theirs = (learned(model, 8) for model in both(experts, top_k=2, use_gks=use_gks))
    assert mine[0].keys() == theirs[0].keys() and len(mine[0]) == 24
    assert all(is_close(mine[0][key], theirs[0][key]) for key in mine[0])
    assert_close(mine[1], theirs[1])
    assert mine[1][-1] < mine[1][0]


def test_prototypes_are_exact_where_the_first_direction_is_hardly_ahead() -> None:
    generator = torch.Generator().manual_seed(1)
    lora_A, lora_B = torch.randn(4, 20, generator=generator), torch.randn(30, 4, generator=generator)
    left, values, right = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
    values[:4] = torch.tensor([1.0, 0.99, 0.98, 0.97])
    lora_A, lora_B = right[:4], left[:, :4] * values[:4]
    found = arrow.prototype(lora_A, lora_B)
    assert_close((found @ right[0]).abs(), torch.ones(()), depth=1)
    config: Any = peft.tuners.lora.ArrowConfig(rng_seed=0)
    config.task_adapter_names = []
    layer: Any = peft.tuners.lora.arrow.ArrowLoraLinearLayer(20, config)
    theirs = layer.top_right_singular_vec_from_BA(lora_A, lora_B)
    assert (theirs @ right[0]).abs() < 0.95


def test_general_knowledge_is_subtracted_without_changing_the_adapters(experts: list[str]) -> None:
    mine, theirs = both(experts, use_gks=True)
    alone = PeftModel.from_pretrained(llama(), experts[0])
    for model in (mine, theirs):
        logits(model)
        model.set_adapter("task_0")
    assert torch.equal(logits(mine), logits(alone))
    assert differ(logits(theirs), logits(alone))


def test_prototypes_are_kept_until_a_factor_changes(experts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = ours(experts), []
    exact = arrow.prototype
    monkeypatch.setattr(arrow, "prototype", lambda *factors: made.append(1) or exact(*factors))

    def count() -> int:
        made.clear()
        assert torch.equal(logits(model), logits(copy.deepcopy(model)))
        return len(made) - 12  # of the copy, which keeps none

    layers = [layer.adapter("task_1").get_parameter("lora_A") for layer in model.manager.layers.values()]
    assert (count(), count()) == (12, 0)
    with torch.no_grad():
        layers[0].mul_(-2.0)
    assert (count(), count()) == (3, 0)
    layers[1].data = layers[1].data + 1
    assert (count(), count()) == (3, 0)
    layers[2].data.mul_(3.0)
    assert (count(), count()) == (3, 0)
    layers[3].grad = torch.ones_like(layers[3])
    torch.optim.AdamW([layers[3]], lr=0.1, fused=True).step()
    assert (count(), count()) == (12, 0)
    model.delete_adapter("task_2")
    assert model.manager.active == ("arrow_router",)


def test_merging_is_refused_and_changes_nothing(experts: list[str]) -> None:
    model = ours(experts)
    before = state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="Arrow routes each token"):
            merge()
    assert same_state(before, state(model)) and not model.manager.merged
    model.set_adapter("task_0")
    model.merge_adapter()
    model.unmerge_adapter()
    assert same_state(before, state(model))
    with pytest.raises(NbpeftError, match="combin"):
        model.add_weighted_adapter(["arrow_router", "task_0"], [1.0, 1.0], "both")


@pytest.mark.parametrize("library", [nbpeft, peft])
def test_routers_are_read_from_files_of_both(experts: list[str], library: Any, tmp_path: Path) -> None:
    mine, theirs = both(experts, top_k=2, use_gks=True, router_temperature=2.0)
    (mine if library is nbpeft else theirs).save_pretrained(tmp_path, selected_adapters=["arrow_router"])
    model = ours(experts, use_gks=True)
    with warnings.catch_warnings(action="error"):
        model.load_adapter(str(tmp_path / "arrow_router"), "router")
    assert differ(logits(model), logits(mine))
    model.set_adapter("router")
    assert torch.equal(logits(model), logits(mine))
    with pytest.raises(ConfigError, match=r"Arrow has no adapter|'task_0', which is not on the layer|needs general"):
        PeftModel.from_pretrained(llama(), tmp_path / "arrow_router")


def test_rows_and_scopes(experts: list[str]) -> None:
    model, ids = ours(experts, top_k=2), tokens(3)
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=["arrow_router", "task_1", "__base__"]).logits
    routed = logits(model, ids)
    with model.use("task_1"):
        alone = logits(model, ids)
    with model.disable_adapter():
        expected = [routed[0], alone[1], logits(model, ids)[2]]
    assert_close(found, torch.stack(expected))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), routed)


def test_all_adapters_act_where_there_are_fewer_than_top_k(experts: list[str]) -> None:
    few = create_arrow_model(llama(), experts[:2], ArrowConfig(top_k=3))
    assert torch.equal(logits(few), logits(create_arrow_model(llama(), experts[:2], ArrowConfig(top_k=2))))


def test_the_bias_of_an_adapter_is_added_as_well(tmp_path: Path) -> None:
    folder = saved_expert(tmp_path, 3, lora_bias=True, target_modules=["q_proj"])
    alone = PeftModel.from_pretrained(llama(), folder)
    assert alone.manager.layers
    with torch.no_grad():
        for layer in alone.manager.layers.values():
            layer.adapter("default").get_parameter("lora_B_bias").fill_(0.3)
    alone.save_pretrained(folder)
    assert_close(logits(create_arrow_model(llama(), [folder], ArrowConfig())), logits(alone))


def test_what_fails_leaves_the_model_as_it_was(experts: list[str], tmp_path: Path) -> None:
    other = saved_expert(tmp_path / "other", 9, target_modules=["q_proj"])
    wide = saved_expert(tmp_path / "wide", 9, r=5)
    dora = saved_expert(tmp_path / "dora", 9, use_dora=True)
    base = llama()
    before, modules = state(base), [type(module) for module in base.modules()]
    failing: list[tuple[Any, str]] = [
        (([], ArrowConfig()), "at least one adapter"),
        ((experts[:1], ArrowConfig(use_gks=True)), "general LoRA paths"),
        (([experts[0], str(tmp_path / "none")], ArrowConfig()), "none"),
        (([experts[0], other], ArrowConfig()), "'task_0' and 'task_1' adapt different layers"),
        ((experts[:1], ArrowConfig(use_gks=True), [wide]), "one rank, these have 3, 5"),
        (([experts[0]], ArrowConfig(use_gks=True), [dora]), "'gks_0' is a DoRA"),
    ]
    for arguments, message in failing:
        with pytest.raises(NbpeftError, match=message) as failure:
            create_arrow_model(base, *arguments)
        assert "\n" not in str(failure.value)
        assert same_state(before, state(base)) and modules == [type(module) for module in base.modules()]
        assert nbpeft.engine.tree.model_tree.manager_of(base) is None


def test_a_router_over_named_adapters_misses_them_in_one_line(experts: list[str]) -> None:
    model = ours(experts)
    settings = {"task_adapter_names": ["task_0", "task_1"]}
    with pytest.raises(ConfigError, match="'task_9', which is not on the layer; it has 'task_0'"):
        model.add_adapter("no", LoraConfig(arrow_config={"task_adapter_names": ["task_9"]}, target_modules=TARGETS))
    with pytest.raises(ConfigError, match="linear layers only"):
        model.add_adapter("no", LoraConfig(arrow_config={}, target_modules=["embed_tokens"]))
    model.add_adapter("two", LoraConfig(arrow_config=settings, target_modules=TARGETS))
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(create_arrow_model(llama(), experts[:2], ArrowConfig())))
    model.delete_adapter("task_1")
    with pytest.raises(NbpeftError, match="routes over 'task_1'"):
        logits(model)
    with pytest.raises(ConfigError, match="no adapter to route to"):
        get_peft_model(
            nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), LoraConfig(arrow_config={}, target_modules=["q_proj"])
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k must be a positive whole number"),
        ({"router_temperature": 0.0}, "router_temperature must be above 0"),
        ({"topk": 2}, "arrow_config has no field 'topk'"),
        (3, "arrow_config must be a ArrowConfig or a dictionary"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(arrow_config=settings)
    with pytest.raises(ConfigError, match="use_dora cannot be combined with arrow_config"):
        LoraConfig(arrow_config={}, use_dora=True)
