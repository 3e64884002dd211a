"""What of a model can carry no adapter is refused before anything is changed."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    WavLMConfig,
    WavLMModel,
)

import nbpeft
from nbpeft import (
    ArrowConfig,
    BOFTConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoraConfig,
    VeraConfig,
    get_peft_model,
)
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import ConfigError, LayerKindError, MergeError, TargetError
from tests.closeness import assert_close
from tests.tiny_models import same_state, state

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 32}


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(**SMALL))


def falcon_mamba() -> nn.Module:
    return FalconMambaForCausalLM(FalconMambaConfig(**SMALL))


def mamba2() -> nn.Module:
    return Mamba2ForCausalLM(Mamba2Config(**SMALL, num_heads=4, head_dim=8, n_groups=1, expand=2))


@pytest.mark.parametrize("make", [mamba, falcon_mamba, mamba2])
@pytest.mark.parametrize("name", ["out_proj", "conv1d"])
def test_layers_that_peft_refuses_for_fused_kernels_are_refused(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is incompatible"):
        peft.get_peft_model(make(), peft.LoraConfig(target_modules=["in_proj", name]))
    model = make()
    before = state(model)
    with pytest.raises(
        TargetError, match=rf"mixer\.{name} cannot be adapted: .*without calling it.*remove '{name}' from"
    ) as error:
        get_peft_model(model, LoraConfig(target_modules=["in_proj", name]))
    assert "\n" not in str(error.value)
    assert same_state(before, state(model)) and all(p.requires_grad for p in model.parameters())
    assert manager_of(model) is None


@pytest.mark.parametrize("make", [mamba, falcon_mamba])
def test_so_is_the_step_projection_which_is_never_called(make: Any) -> None:
    model, calls = make().eval(), []
    for name, module in model.named_modules():
        if name.endswith(".dt_proj"):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.arange(6)[None])
    assert not calls
    with pytest.raises(TargetError, match="dt_proj"):
        get_peft_model(model, LoraConfig(target_modules=["dt_proj"]))


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_so_is_the_attention_of_wavlm_where_an_adapter_of_peft_has_no_effect(name: str) -> None:
    def made() -> Any:
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_conv_pos_embeddings": 16}
        return WavLMModel(
            WavLMConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, num_conv_pos_embedding_groups=4)
        ).eval()

    adapted: Any = peft.get_peft_model(made(), peft.LoraConfig(target_modules=[name], init_lora_weights=False))
    sound = torch.randn(1, 1600)
    with torch.no_grad(), adapted.disable_adapter():
        without = adapted(sound).last_hidden_state
    with torch.no_grad():
        assert torch.equal(adapted(sound).last_hidden_state, without)
    with pytest.raises(TargetError, match=f"{name} cannot be adapted: wavlm reads its weight without calling it"):
        get_peft_model(made(), LoraConfig(target_modules=[name]))


@pytest.mark.parametrize("make", [mamba, falcon_mamba, mamba2])
def test_all_linear_leaves_them_out(make: Any) -> None:
    model = get_peft_model(make(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    names = {path.rpartition(".")[2] for path in model.targeted_module_names}
    assert names == ({"in_proj"} if make is mamba2 else {"in_proj", "x_proj"})


def test_excluding_them_is_enough() -> None:
    config = LoraConfig(target_modules=r".*_proj", exclude_modules=["dt_proj", "out_proj"])
    assert len(get_peft_model(mamba(), config).targeted_module_names) == 2


@pytest.mark.parametrize("target", ["0", "1"])
def test_a_lazy_layer_without_a_shape_is_named_before_anything_is_frozen(target: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4))
    with pytest.raises(LayerKindError, match=r"^1 is a LazyLinear that has no shape yet: call the model with a batch"):
        get_peft_model(model, LoraConfig(target_modules=[target]))
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.randn(2, 3))
    get_peft_model(model, LoraConfig(target_modules=[target]))


def used(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The output of an adapted model, which is the same while its adapter is merged."""
    output: torch.Tensor = model(x)
    output.sum().backward()
    model.merge_adapter()
    assert_close(model(x), output)
    model.unmerge_adapter()
    return output.detach()


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
def test_a_layer_without_features_works_as_in_peft(shape: tuple[int, int], use_dora: bool) -> None:
    base, x = nn.Linear(*shape), torch.randn(3, 2, shape[0])
    settings: dict[str, Any] = {"target_modules": ["0"], "r": 2}
    ours = get_peft_model(nn.Sequential(base), LoraConfig(**settings, use_dora=use_dora, init_lora_weights=False))
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), peft.LoraConfig(**settings))  # DoRA gives NaN
    assert torch.equal(used(ours, x), used(theirs, x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_so_does_a_mixed_batch() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(0, 8)), LoraConfig(target_modules=["0"])).eval()
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    x = torch.randn(2, 3, 0)
    assert torch.equal(model(x, adapter_names=["default", "other"]), model(x))


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), *layers)


def unchanged(model: nn.Module) -> bool:
    return all(p.requires_grad for p in model.parameters()) and not hasattr(model, "_nbpeft_manager")


def test_lazy_layers_are_refused_whole() -> None:
    model = net(nn.LazyLinear(4))
    with pytest.raises(TargetError, match="1 is a LazyLinear that has no shape yet"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))
    assert unchanged(model) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_starting_in_a_weight_that_is_not_finite(init: str) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
    with pytest.raises(ConfigError, match=f"0: init_lora_weights='{init}' starts in the weight, which is not finite"):
        get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=init))
    assert unchanged(model)


def test_a_weight_without_data_is_not_merged_into() -> None:
    with torch.device("meta"):
        model = get_peft_model(net(), LoraConfig(target_modules=["0"]))
    with pytest.raises(MergeError, match="0: its weight has no data"):
        model.merge_adapter()
    assert model.manager.merged == ()


def test_an_adapter_many_times_its_model_is_refused() -> None:
    model = net()
    with pytest.raises(ConfigError, match=r"268,435,456 values, more than ten times"):
        get_peft_model(model, LoraConfig(r=2**24, target_modules=["0"]))
    assert unchanged(model)
    get_peft_model(model, LoraConfig(r=512, target_modules=["0"]))


TOO_LARGE: dict[str, AdapterConfig] = {
    "factors-drawn": nbpeft.UniLoraConfig(r=2**22),
    "factors-saved": nbpeft.UniLoraConfig(r=2**22, save_indices=True),
    "projections-drawn": nbpeft.TinyLoraConfig(u=2**24, r=32, save_projection=False),
    "projections-saved": nbpeft.TinyLoraConfig(u=2**24, r=32),
    "shared": nbpeft.VeraConfig(r=2**24, save_projection=False),
    "bases": nbpeft.RandLoraConfig(r=2**24),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_is_shared_or_drawn_counts_as_well(case: str) -> None:
    model, config = net(), TOO_LARGE[case].copy(target_modules={"0"})
    with pytest.raises(ConfigError, match=r"the adapter would have [\d,]{11,} values, more than ten times"):
        get_peft_model(model, config)
    assert unchanged(model)


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (BOFTConfig(boft_block_size=2), nn.Conv2d(4, 4, 1, groups=2)),
        (HRAConfig(), nn.Conv2d(4, 4, 1, groups=2)),
        (HiraConfig(r=2), nn.Conv2d(4, 4, 1, groups=2)),
        (LoraConfig(arrow_config=ArrowConfig()), nn.Conv2d(4, 4, 1)),
        (IA3Config(feedforward_modules=[]), nn.Embedding(4, 4)),
        (VeraConfig(), nn.Conv1d(4, 4, 1)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_kind_of_layer_that_a_method_does_not_take_is_one_error_by_all_names(config: Any, layer: nn.Module) -> None:
    # PEFT raises NotImplementedError, TypeError or ValueError, each for another method.
    config.target_modules = ["0"]
    with pytest.raises(LayerKindError, match="exclude it") as raised:
        get_peft_model(nn.Sequential(layer), config)
    assert all(isinstance(raised.value, kind) for kind in (NotImplementedError, TypeError, ValueError, ConfigError))
