"""Hot-swapping saved adapters under PEFT's names."""

from __future__ import annotations

import importlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

import nbpeft
from nbpeft.engine.methods.vectors.ia3 import IA3Config
from nbpeft.errors import (
    BaseMismatchError,
    ConfigError,
    HotSwapError,
    UnknownAdapterError,
    UnknownMethodError,
)
from nbpeft.model import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from nbpeft.peft_api.names import value
from tests.closeness import assert_close
from tests.tiny_models import adapted, classifier, config, llama, logits, same_state, state, tokens


def saved(folder: Path, seed: int = 5, base: Any = None, **changes: Any) -> Path:
    """A saved adapter whose every tensor differs from a fresh one."""
    torch.manual_seed(seed)
    model = adapted(base, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.manager.parameters("default"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank": {"r": 7, "lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 30}},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lora-bias": {"lora_bias": True},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_loading_and_saves_what_it_holds(case: str, tmp_path: Path) -> None:
    changes = CASES[case]
    source = saved(tmp_path / "new", **changes)
    model = adapted(**{key: value for key, value in changes.items() if key not in ("r", "rank_pattern")})
    expected = logits(PeftModel.from_pretrained(llama(), source))
    hotswap_adapter(model, source, "default")
    assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "again")), expected)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "again")
    assert_close(logits(theirs), expected)


def test_equals_peft(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "first", 1), saved(tmp_path / "second", 2)
    oracle: Any = peft.PeftModel.from_pretrained(llama(), first).eval()
    model = PeftModel.from_pretrained(llama(), first)
    peft_hotswap_adapter(oracle, str(second), "default", torch_device="cpu")
    hotswap_adapter(model, second, "default")
    assert_close(logits(model), logits(oracle))


def test_a_trained_head_is_swapped(tmp_path: Path) -> None:
    source = saved(tmp_path, base=classifier(), task_type="SEQ_CLS")
    model = adapted(classifier(), task_type="SEQ_CLS")
    hotswap_adapter(model, source, "default")
    expected = logits(PeftModel.from_pretrained(classifier(), source))
    assert_close(logits(model), expected)


def test_a_file_without_the_trained_head_resets_it_and_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    source = saved(tmp_path / "new", base=classifier())
    model = adapted(classifier(), modules_to_save=["score"])
    base = state(model.get_base_model().score.original_module)
    with torch.no_grad():
        model.get_base_model().score.modules_to_save["default"].weight.add_(1)
    assert hotswap_adapter(model, source, "default").reset == ("score",)
    assert same_state(state(model.get_base_model().score.original_module), base)
    assert same_state(state(model.get_base_model().score.modules_to_save["default"]), base)


def test_state_dicts_in_the_keys_of_files_and_of_peft_models(tmp_path: Path) -> None:
    source = saved(tmp_path, use_dora=True, target_modules=["q_proj", "embed_tokens"])
    donor = PeftModel.from_pretrained(llama(), source)
    in_file = get_peft_model_state_dict(donor, save_embedding_layers=False)
    oracle: Any = peft.PeftModel.from_pretrained(llama(), source, adapter_name="other")
    in_model = {key: value for key, value in oracle.state_dict().items() if ".lora_" in key}
    for name, tensors in (("default", in_file), ("other", in_model)):
        model = adapted(name=name, use_dora=True, target_modules=["q_proj", "embed_tokens"])
        hotswap_adapter_from_state_dict(model, tensors, name, donor.peft_config["default"])
        assert_close(logits(model), logits(donor))


def test_tensors_of_the_slot_itself_are_read_before_they_are_overwritten() -> None:
    model = adapted()
    own = get_peft_model_state_dict(model)
    layers = ("layers.0", "layers.1")
    exchanged = {key: own[key.replace(*layers) if layers[0] in key else key.replace(*layers[::-1])] for key in own}
    expected = {key: tensor.clone() for key, tensor in exchanged.items()}
    hotswap_adapter_from_state_dict(model, exchanged, "default", config())
    assert same_state(get_peft_model_state_dict(model), expected)


def test_5_a_name_inside_another_is_left_alone(tmp_path: Path) -> None:
    """PEFT zeroes ``default2`` when ``default`` is swapped."""
    source = saved(tmp_path)
    model = adapted()
    model.add_adapter("default2", config())
    with model.use("default2"):
        before = logits(model)
    hotswap_adapter(model, source, "default")
    with model.use("default2"):
        assert torch.equal(logits(model), before)


def test_6_an_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, base=llama(hidden_size=64))
    model = adapted()
    before = state(model)
    with pytest.raises((BaseMismatchError, HotSwapError), match="64"):
        hotswap_adapter(model, source, "default")
    assert same_state(before, state(model))


def test_more_layers_and_other_methods_are_refused(tmp_path: Path) -> None:
    model = adapted()
    before = state(model)
    wider = saved(tmp_path / "wider", target_modules=["q_proj", "v_proj", "down_proj"])
    with pytest.raises(HotSwapError, match=r"unexpected keys found.*down_proj\.lora_A"):
        hotswap_adapter(model, wider, "default")
    with pytest.raises(HotSwapError, match="is LoRA and cannot be swapped for DoRA"):
        hotswap_adapter(model, saved(tmp_path / "dora", use_dora=True), "default")
    with pytest.raises(UnknownAdapterError, match="'deflaut' not found"):
        hotswap_adapter(model, wider, "deflaut")
    assert same_state(before, state(model))


def test_validation_puts_the_old_adapter_back(tmp_path: Path) -> None:
    source = saved(tmp_path)
    model = adapted()
    before, output = state(model), logits(model)
    expected = logits(PeftModel.from_pretrained(llama(), source))

    def worse(candidate: nn.Module) -> bool:
        assert candidate is model
        assert_close(logits(candidate), expected)
        return False

    with pytest.raises(HotSwapError, match="did not pass its validation; 'default' is unchanged") as refused:
        hotswap_adapter(model, source, "default", validate=worse)
    assert refused.value.details == {"name": "default"}
    assert same_state(before, state(model)) and torch.equal(logits(model), output)
    hotswap_adapter(model, source, "default", validate=lambda candidate: True)
    assert_close(logits(model), expected)


@pytest.mark.parametrize("verdict", ["vector", "lines"])
def test_a_validation_that_cannot_be_judged_puts_it_back_too(verdict: str, tmp_path: Path) -> None:
    source, model = saved(tmp_path), adapted()
    before = state(model)

    def judge(candidate: nn.Module) -> object:
        if verdict == "lines":
            raise RuntimeError("first line\nsecond line")
        return torch.tensor([True, False])

    with pytest.raises(HotSwapError, match=r"validating the new adapter failed \(.*'default' is unchanged") as caught:
        hotswap_adapter(model, source, "default", validate=judge)
    assert "\n" not in str(caught.value)
    assert same_state(before, state(model))


def test_wrong_arguments_are_told_in_one_line_before_anything_happens(tmp_path: Path) -> None:
    source, model = saved(tmp_path), adapted()
    before, own = state(model), model.peft_config["default"]
    tensors = get_peft_model_state_dict(model)
    with pytest.raises(ConfigError, match=r"has no argument 'validat'\. Did you mean 'validate'"):
        hotswap_adapter(model, source, "default", validat=lambda candidate: False)
    with pytest.raises(ConfigError, match="no device 'nowhere'"):
        hotswap_adapter(model, source, "default", torch_device="nowhere")
    for wrong in (None, dict.fromkeys(tensors, 3), {key: tensor.numpy() for key, tensor in tensors.items()}):
        with pytest.raises(HotSwapError, match="state_dict must have tensors"):
            hotswap_adapter_from_state_dict(model, wrong, "default", own)  # type: ignore[arg-type]
    with pytest.raises(UnknownMethodError, match="LoraConfig of peft is not the config of a known method"):
        hotswap_adapter_from_state_dict(model, tensors, "default", peft.LoraConfig())  # type: ignore[arg-type]
    for rank in ("8", 8.0, True, 0):
        with pytest.raises(ConfigError, match="target_rank must be a positive whole number"):
            prepare_model_for_compiled_hotswap(model, target_rank=rank)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="config must be an adapter's config"):
        prepare_model_for_compiled_hotswap(model, target_rank=8, config="default")  # type: ignore[arg-type]
    assert same_state(before, state(model)) and model.peft_config["default"] is own


@pytest.mark.slow
def test_compiled_models_need_room_and_then_never_compile_again(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = adapted(r=2)
    bigger = saved(tmp_path / "8", 8, r=8)
    compiled: Any = torch.compile(model, backend="aot_eager")
    with pytest.raises(HotSwapError, match=r"rank 8 does not fit a slot of rank 2.*target_rank=8"):
        hotswap_adapter(compiled, bigger, "default")
    with pytest.raises(HotSwapError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="already compiled: it will compile again"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="ignore")
    logits(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rank in (8, 2, 5):
            source = saved(tmp_path / str(rank), rank, r=rank, lora_alpha=rank * 3)
            hotswap_adapter(compiled, source, "default")
            expected = logits(PeftModel.from_pretrained(llama(), source))
            assert_close(logits(compiled), expected)
    torch._dynamo.reset()


def test_configs_handed_to_prepare_get_the_rank_and_keep_the_scaling(tmp_path: Path) -> None:
    """PEFT sets r alone, so that what is saved afterwards loads with another scaling."""
    model = adapted(r=4, lora_alpha=6, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 5})
    before = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    assert vars(model.peft_config["default"])["r"] == 8
    assert_close(logits(model), before)
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), before)
    loose = config(r=4, lora_alpha=6)
    prepare_model_for_compiled_hotswap(adapted(), target_rank=8, config=loose)
    assert (loose.r, loose.scaling_at("x")) == (8, 1.5)


def test_prepare_refuses_what_it_cannot_do() -> None:
    with pytest.raises(HotSwapError, match="load an adapter"):
        prepare_model_for_compiled_hotswap(llama(), target_rank=8)
    with pytest.raises(HotSwapError, match="has rank 4, more than target_rank=2"):
        prepare_model_for_compiled_hotswap(adapted(), target_rank=2)
    with pytest.raises(ConfigError, match="Did you mean 'ignore'"):
        prepare_model_for_compiled_hotswap(adapted(), target_rank=8, check_compiled="ignor")
    with pytest.raises(ConfigError, match="IA3Config has no size that could be set"):
        prepare_model_for_compiled_hotswap(adapted(), target_rank=8, config=IA3Config())


def test_embeddings_that_the_file_brings_along(tmp_path: Path) -> None:
    """The base's own embeddings in the file are no obstacle; others would change every adapter."""
    source = tmp_path / "same"
    donor = adapted(target_modules=["embed_tokens"])
    donor.save_pretrained(source, save_embedding_layers=True)
    model = adapted(target_modules=["embed_tokens"])
    hotswap_adapter(model, source, "default")
    assert_close(logits(model), logits(donor))
    with torch.no_grad():
        base: Any = donor.get_base_model()
        base.get_input_embeddings().weight.add_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        donor.save_pretrained(tmp_path / "other", save_embedding_layers=True)
        before = state(model)
        with pytest.raises(HotSwapError, match=r"has its own model\.embed_tokens\.weight"):
            hotswap_adapter(model, tmp_path / "other", "default")
    assert same_state(before, state(model)) and logits(model, tokens()).isfinite().all()


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_file_that_lacks_a_tensor_may_be_taken(in_memory: bool, tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def swapped(library: Any, swap: Any, **options: Any) -> Any:
        model = library.PeftModel.from_pretrained(base(), tmp_path)
        tensors = load_file(file)
        tensors.pop("base_model.model.1.lora_A.weight")
        if in_memory:
            named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
            swap(model, named, "default", config=model.peft_config["default"], **options)
            return model
        save_file(tensors, lacking / "adapter_model.safetensors")
        swap(model, lacking, "default", **options)
        return model

    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    file, lacking = tmp_path / "adapter_model.safetensors", tmp_path / "lacking"
    shutil.copytree(tmp_path, lacking)
    names = ["hotswap_adapter", "hotswap_adapter_from_state_dict"]
    mine, theirs, by_path = (
        getattr(nbpeft, names[in_memory]),
        getattr(importlib.import_module("peft.utils.hotswap"), names[in_memory]),
        value("utils.hotswap", names[in_memory]),
    )
    with pytest.raises(HotSwapError, match="lacks lora_A"):
        swapped(nbpeft, mine)
    expected = swapped(peft, theirs, **({"parameter_prefix": "lora_"} if in_memory else {}))
    zero = expected.base_model.model[1].lora_A["default"].weight
    assert not zero.any()
    for swap, options in ((mine, {"allow_missing": True}), (by_path, {})):
        with pytest.warns(UserWarning, match="lacks '1.lora_A': the layers that lack tensors add nothing"):
            found = swapped(nbpeft, swap, **options)
        x = torch.ones(1, 4)
        layer = found.base_model.model[1]
        assert_close(layer(x), layer.base_layer(x))
        assert not torch.equal(found.base_model.model[0](x), found.base_model.model[0].base_layer(x))


def test_patterns_of_ranks_take_the_target_rank_as_in_peft() -> None:
    found = []
    for library in (nbpeft, peft):
        config = library.LoraConfig(r=2, rank_pattern={"v_proj": 3}, target_modules=["q_proj", "v_proj"])
        model = library.get_peft_model(llama(), config)
        swapping = importlib.import_module(f"{library.__name__}.utils.hotswap")
        swapping.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
        found.append((model.peft_config["default"].r, model.peft_config["default"].rank_pattern))
    assert found[0] == found[1] == (8, {"v_proj": 8})
