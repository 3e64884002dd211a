"""EVA: adapters that start in the directions of their layers' inputs, and share the ranks out."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import eva as peft_eva
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import nbpeft
from nbpeft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from nbpeft.engine.methods.lora.initialization.incremental_pca import IncrementalPCA
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.model import get_peft_model_state_dict
from tests.closeness import assert_close, differ, is_close
from tests.tiny_models import same_state, state

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]


def base() -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=1, num_key_value_heads=4, **shape)).eval()


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    torch.manual_seed(7)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 40, (4, 16))
        mask = torch.ones_like(ids)
        mask[0, 10:] = 0
        labels = ids.clone()
        labels[:, :3] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def adapted(library: Any = nbpeft, **more: Any) -> Any:
    eva = {key: more.pop(key) for key in list(more) if key in EvaConfig.__dataclass_fields__}
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **more}
    config = library.LoraConfig(init_lora_weights="eva", eva_config=library.EvaConfig(**eva), **settings)
    return library.get_peft_model(base(), config)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rho": 1.0},
        {"rho": 3.0, "adjust_scaling_factors": False, "use_rslora": True},
        {"use_label_mask": False, "rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"o_proj": 3}},
        {"tau": 0.5},
    ],
)
def test_directions_ranks_and_scalings_are_those_of_peft(more: dict[str, Any]) -> None:
    ours, theirs = adapted(**more), adapted(peft, **more)
    found = get_eva_state_dict(ours, batches(), show_progress_bar=False)
    expected = peft_eva.get_eva_state_dict(theirs, batches(), show_progress_bar=False)
    assert {name: value.shape for name, value in found.items()} == {k: v.shape for k, v in expected.items()}
    for name, value in expected.items():
        assert_close(found[name].double(), value.double(), dtype=torch.float32, message=name)
    initialize_lora_eva_weights(ours, eva_state_dict=found)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=dict(expected))
    own, given = get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert own.keys() == given.keys()
    assert all(is_close(own[key], value) for key, value in given.items())
    mine, other = ours.peft_config["default"], theirs.peft_config["default"]
    assert (mine.rank_pattern, mine.alpha_pattern) == (other.rank_pattern, other.alpha_pattern)
    ids = batches(1)[0]["input_ids"]
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.01)
    assert_close(ours(ids).logits, theirs(ids).logits)


def test_whitened_directions_are_divided_once_for_each_layer() -> None:
    """PEFT divides those of layers with one input once for each of them."""
    plain = get_eva_state_dict(adapted(rho=1.0), batches(), show_progress_bar=False)
    white = get_eva_state_dict(adapted(rho=1.0, whiten=True), batches(), show_progress_bar=False)
    theirs = peft_eva.get_eva_state_dict(adapted(peft, rho=1.0, whiten=True), batches(), show_progress_bar=False)
    names = [f"base_model.model.model.layers.0.self_attn.{name}_proj" for name in ("q", "k")]
    first, second = (white[name] for name in names)
    assert torch.equal(first, second) and differ(first, plain[names[0]])
    assert differ(theirs[names[1]].double(), second.double())
    alone = "base_model.model.model.layers.0.self_attn.o_proj"
    assert_close(theirs[alone].double(), white[alone].double(), dtype=torch.float32)


def test_a_model_without_adapters_gives_the_same_directions() -> None:
    model = adapted()
    found = get_eva_state_dict(model, batches(), show_progress_bar=False)
    plain = base().train()
    before = state(plain)
    bare = get_eva_state_dict(plain, batches(), model.peft_config["default"], show_progress_bar=False)
    assert {f"base_model.model.{name}": value.shape for name, value in bare.items()} == {
        name: value.shape for name, value in found.items()
    }
    assert same_state(before, state(plain)) and all(module.training for module in plain.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())
    initialize_lora_eva_weights(model, eva_state_dict=bare)
    own = get_peft_model_state_dict(model)
    for name, value in bare.items():
        assert torch.equal(own[f"base_model.model.{name}.lora_A.weight"], value.float())


def test_it_starts_at_the_base_trains_saves_and_loads(tmp_path: Path) -> None:
    model = adapted(use_dora=True)
    initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    ids = batches(1)[0]["input_ids"]
    assert_close(model(ids).logits, base()(ids).logits)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(base(), tmp_path)
    assert_close(again(ids).logits, expected)
    assert_close(peft.PeftModel.from_pretrained(base(), tmp_path)(ids).logits, expected)


def test_a_layer_without_ranks_loses_its_adapter() -> None:
    model = adapted(target_modules=[*TARGETS, "embed_tokens"])
    directions = get_eva_state_dict(model, batches(), show_progress_bar=False)
    gone = "model.layers.0.self_attn.o_proj"
    directions[f"base_model.model.{gone}"] = directions[f"base_model.model.{gone}"][:0]
    with pytest.warns(UserWarning, match=r"no directions for 'model\.embed_tokens'"):
        initialize_lora_eva_weights(model, eva_state_dict=directions)
    assert gone not in model.manager.layers and "model.embed_tokens" in model.manager.layers
    assert gone not in model.peft_config["default"].target_modules


def test_what_cannot_be_done_is_refused_and_changes_nothing() -> None:
    model = adapted()
    before = copy.deepcopy(get_peft_model_state_dict(model))
    with pytest.raises(ConfigError, match="dataloader is required"):
        initialize_lora_eva_weights(model)
    with pytest.raises(ConfigError, match="dataloader is empty"):
        initialize_lora_eva_weights(model, [])
    with pytest.raises(ConfigError, match="no batch has 8 tokens"):
        initialize_lora_eva_weights(model, [{"input_ids": torch.arange(5)[None]}], show_progress_bar=False)
    with pytest.raises(ConfigError, match="names 'nothing', which EVA does not initialize"):
        get_eva_state_dict(model, batches(), prepare_layer_inputs_fn={"nothing": lambda *_: torch.empty(0)})
    with pytest.raises(TypeError, match="takes a batch as a dictionary, not list"):
        initialize_lora_eva_weights(model, [[1]], show_progress_bar=False)
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    other = get_peft_model(base(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match="can only be used with `init_lora_weights='eva'`"):
        initialize_lora_eva_weights(other, batches())
    with pytest.raises(AdapterError, match="No adapter layers found"):
        initialize_lora_eva_weights(base(), batches())
    with pytest.raises(ConfigError, match="peft_config is required"):
        get_eva_state_dict(base(), batches())


@pytest.mark.parametrize("half", [False, True])
def test_adapters_without_values_start_as_in_peft(half: bool) -> None:
    after = {}
    for library in (peft, nbpeft):
        torch.manual_seed(3)
        settings = {"init_lora_weights": "eva", "target_modules": TARGETS, "r": 4}
        config = library.LoraConfig(eva_config=library.EvaConfig(rho=2.0), **settings)
        model = base().to(torch.bfloat16 if half else torch.float32)
        model = library.get_peft_model(model, config, low_cpu_mem_usage=True, autocast_adapter_dtype=not half)
        library.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
        assert not any(parameter.is_meta for parameter in model.parameters())
        after[library] = library.get_peft_model_state_dict(model), torch.rand(1)
    (theirs, random), (ours, ours_random) = after.values()
    assert ours.keys() == theirs.keys() and torch.equal(ours_random, random)
    assert all(value.dtype == theirs[key].dtype for key, value in ours.items())
    for key, value in ours.items():
        assert_close(value.abs(), theirs[key].abs(), message=key)


def test_components_of_batches_are_those_of_all_rows() -> None:
    rows = torch.randn(90, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 7)
    from peft.utils.incremental_pca import IncrementalPCA as Theirs

    ours, theirs = IncrementalPCA(3, batch_size=20).fit(rows), Theirs(3, batch_size=20).fit(rows)
    for name in ("components_", "singular_values_", "explained_variance_ratio_", "mean_", "var_", "noise_variance_"):
        assert_close(getattr(ours, name), getattr(theirs, name), message=name)
    assert_close(ours.transform(rows), theirs.transform(rows))
    whole = torch.linalg.svd(rows - rows.mean(0))[2][:3]
    assert (ours.components_ @ whole.T).abs().diagonal().min() > 0.95
    for settings in ((10, 3, 2), (10, 5, 3), (4, 5, 1), (12, 4, 1)):
        assert list(IncrementalPCA.gen_batches(*settings)) == list(Theirs.gen_batches(*settings))
    with pytest.raises(ConfigError, match="n_components=7 invalid for n_features=6"):
        IncrementalPCA(7).fit(rows)
    with pytest.raises(ConfigError, match="n_components must be specified"):
        IncrementalPCA(lowrank=True)
    assert IncrementalPCA(lowrank=True, lowrank_q=3).lowrank_q == 3
    for given, q in ((None, 4), (3, 3)):
        made, known = (kind(2, lowrank=True, lowrank_q=given, lowrank_seed=1) for kind in (IncrementalPCA, Theirs))
        assert made.lowrank_q == known.lowrank_q == q
        assert_close(made.fit(rows).components_, known.fit(rows).components_)
