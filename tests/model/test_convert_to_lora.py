"""Adapters of every method written as LoRA: as close as can be, never further than peft's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import nbpeft
from nbpeft.engine.contract.registry import Method, methods
from nbpeft.errors import AdapterError, ConfigError, ConversionError, MergeError
from nbpeft.model import PeftModel, convert_to_lora, get_peft_model, save_as_lora
from tests import tiny_models
from tests.closeness import assert_close
from tests.tiny_models import adapted, classifier, gpt2, logits, randomize, same_state, state

pytestmark = pytest.mark.filterwarnings("ignore:Converting a PEFT adapter", "ignore::UserWarning:peft")

TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
SAMPLES = [
    pytest.param(
        method,
        {key: ["down_proj"] if value == ["target"] else value for key, value in fields.items()},
        id=f"{method.peft_type.lower()}-{name}",
    )
    for method in methods()
    for name, fields in method.sample_configs.items()
    if method.shares.companion is None and not method.transforms_calls and not method.kinds.only
]


def llama() -> Any:
    return tiny_models.llama(num_hidden_layers=1)


def adapter_on_llama(**changes: Any) -> PeftModel:
    return adapted(llama(), **changes)


every_sample = pytest.mark.parametrize(("method", "fields"), SAMPLES)


def random_model(method: Method, fields: dict[str, Any], base: Any = None) -> PeftModel:
    model = get_peft_model(llama() if base is None else base, method.config_class(**TARGETS | fields)).eval()
    randomize(model, scale=0.1)
    return model


def deltas(model: PeftModel, name: str = "default") -> dict[str, Tensor]:
    layers = model.manager.layers.items()
    return {path: layer.get_delta_weight(name).double() for path, layer in layers if name in layer.adapters}


def loaded(config: Any, tensors: dict[str, Tensor], base: Any = None) -> PeftModel:
    model = get_peft_model(llama() if base is None else base, config).eval()
    result = nbpeft.set_peft_model_state_dict(model, tensors)
    assert not result.missing_keys and not result.unexpected_keys
    return model


def best(delta: Tensor, rank: int) -> float:
    """The smallest error of any matrix of that rank (Eckart and Young)."""
    return float(torch.linalg.svdvals(delta)[rank:].norm())


def unsupported(model: PeftModel) -> bool:
    return not model.manager.layers or not model.supports_lora_conversion()


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Path -> B A of linear layers."""
    paths = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        path.removeprefix("base_model.model."): tensors[f"{path}.lora_B.weight"].double()
        @ tensors[f"{path}.lora_A.weight"].double()
        for path in paths
    }


@pytest.mark.drawn(30)
@every_sample
def test_nothing_of_that_rank_is_closer(method: Method, fields: dict[str, Any]) -> None:
    model = random_model(method, fields)
    if unsupported(model):
        with pytest.raises(ConversionError, match="support"):
            convert_to_lora(model, 3)
        return
    before, was = deltas(model), state(model)
    for rank in (3, 0.9):
        config, tensors = convert_to_lora(model, rank)
        assert same_state(state(model), was)
        made = deltas(loaded(config, tensors))
        assert made.keys() == before.keys()
        for path, delta in before.items():
            size, norm = config.rank_at(path), float(delta.norm())
            assert config.scaling_at(path) == 1
            assert float((made[path] - delta).norm()) <= best(delta, size) + 1e-5 * norm
            if isinstance(rank, float):
                allowed = math.sqrt(1 - rank) * norm
                assert best(delta, size) <= allowed * (1 + 1e-6)
                assert size == 1 or best(delta, size - 1) > allowed * (1 - 1e-6)


@pytest.mark.drawn(30)
@every_sample
def test_it_is_no_further_than_that_of_peft(method: Method, fields: dict[str, Any], tmp_path: Path) -> None:
    if not hasattr(peft.PeftType, method.peft_type):
        pytest.skip("peft has no such method")
    if method.label in ("BD-LoRA", "QALoRA"):
        pytest.skip("peft takes what the file holds for the factors of a plain LoRA")
    model = random_model(method, fields)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    if not theirs.supports_lora_conversion() or unsupported(model):
        assert not theirs.supports_lora_conversion() or method.label == "aLoRA"
        return
    true = deltas(model)
    # Without the magnitude, or what the adapter started in.
    starts_in_weight = model.peft_config["default"].initialised_from_weight
    loses_in_peft = method.label == "DoRA" or (starts_in_weight and method.label != "PSOFT")
    for rank in (3, 0.9, 1.0):
        config, tensors = convert_to_lora(model, rank)
        their_config, their_tensors = peft.convert_to_lora(theirs, rank)
        assert (config.r, config.lora_alpha) == (their_config.r, their_config.lora_alpha)
        assert tensors.keys() >= their_tensors.keys()
        ours, other = products(tensors), products(their_tensors)
        for path, delta in true.items():
            norm, size = float(delta.norm()), config.rank_at(path)
            missed = float((ours[path] - delta).norm())
            their_size = their_tensors[f"base_model.model.{path}.lora_A.weight"].shape[0]
            if loses_in_peft:
                assert rank != 1.0 or missed <= 1e-5 * norm < float((other[path] - delta).norm())
            elif size == their_size:
                assert missed <= float((other[path] - delta).norm()) + 2e-6 * norm
            elif rank == 1.0:  # peft draws the line to what is rounding alone elsewhere
                assert missed <= 1e-5 * norm
            else:  # peft's has the block's own rank, whatever is asked for
                assert method.label == "MiSS" and size < their_size


def test_what_the_biases_gain_is_kept(tmp_path: Path) -> None:
    config = nbpeft.IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[])
    base = llama()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model = get_peft_model(base, config).eval()
    randomize(model)
    made, tensors = convert_to_lora(model, 16)
    assert made.lora_bias
    fresh = llama()
    fresh.load_state_dict(nbpeft.get_base_model_state_dict(model))
    # What IA³ takes from a value, LoRA takes from it after the product: the sums are of the size of the biases.
    assert_close(logits(loaded(made, tensors, fresh)), logits(model), scale=3.0)


def test_a_saved_one_is_loaded_by_both_libraries(tmp_path: Path) -> None:
    model = get_peft_model(llama(), nbpeft.OFTConfig(oft_block_size=4, task_type="CAUSAL_LM", **TARGETS)).eval()
    randomize(model, scale=0.2)
    save_as_lora(tmp_path / "lora", model, 0.999999)
    ours = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    assert ours.peft_config["default"].task_type == "CAUSAL_LM"
    assert_close(logits(ours), logits(model))
    assert_close(logits(theirs), logits(ours))
    assert model.manager.unsaved == set() and model.peft_config["default"].peft_type == "OFT"


def test_thin_changes_are_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    decomposed = []
    svd = torch.linalg.svd

    def watched(matrix: Tensor, **options: Any) -> Any:
        decomposed.append(tuple(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    fields: dict[type[Any], dict[str, Any]] = {
        nbpeft.LoraConfig: {"r": 6},
        nbpeft.VeraConfig: {"r": 6},
        nbpeft.HRAConfig: {"r": 6},
        nbpeft.MissConfig: {"r": 6},
        nbpeft.LoHaConfig: {"r": 2},
        nbpeft.LoKrConfig: {"r": 1},
    }
    for cls, own in fields.items():
        model = get_peft_model(llama(), cls(target_modules=["q_proj"], **own))
        randomize(model)
        decomposed.clear()
        convert_to_lora(model, 2)
        assert decomposed and all(max(shape) < 32 for shape in decomposed), (cls, decomposed)


def test_a_smaller_lora_keeps_what_its_scale_was(tmp_path: Path) -> None:
    model = adapter_on_llama(r=8)
    model.manager.set_scale("default", 0.5)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        config, tensors = convert_to_lora(model, 0.9999999)
    assert max(config.rank_pattern.values()) <= 8
    assert_close(logits(loaded(config, tensors)), logits(model))


def test_trained_heads_and_tokens_come_along() -> None:
    model = get_peft_model(classifier(), nbpeft.HRAConfig(r=2, task_type="SEQ_CLS", **TARGETS)).eval()
    randomize(model)
    config, tensors = convert_to_lora(model, 2)
    assert config.modules_to_save == ["classifier", "score"] and "base_model.model.score.weight" in tensors
    assert_close(logits(loaded(config, tensors, classifier())), logits(model))
    tokens_too = adapter_on_llama(trainable_token_indices=[1, 4], r=3)
    randomize(tokens_too)
    config, tensors = convert_to_lora(tokens_too, 3)
    assert config.trainable_token_indices == [1, 4]
    assert_close(logits(loaded(config, tensors)), logits(tokens_too))


def test_other_kinds_of_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    model = get_peft_model(net, nbpeft.LoHaConfig(r=2, target_modules=["0", "2"])).eval()
    randomize(model)
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    config, tensors = convert_to_lora(model, 4)
    bare = model.unload()
    assert_close(loaded(config, tensors, bare)(x), expected)
    transposed = get_peft_model(gpt2(), nbpeft.C3AConfig(block_size=8, target_modules=["c_attn"])).eval()
    randomize(transposed, scale=5.0)
    config, tensors = convert_to_lora(transposed, 32)
    assert_close(logits(loaded(config, tensors, gpt2())), logits(transposed))


def test_a_base_model_without_a_handle_has_keys_without_prefix() -> None:
    model = adapter_on_llama()
    _, tensors = convert_to_lora(model.get_base_model(), 2)
    assert all(key.startswith("model.layers.") for key in tensors)
    assert all(key.startswith("base_model.model.") for key in convert_to_lora(model, 2)[1])


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "Passing a rank of 0 doesn't make sense"),
        (-1, "must be at least 1"),
        (123.0, "It must be between 0 and 1 but got 123.0"),
        (33, r"The chosen rank 33 is larger than the weight shape \(32\), please choose a lower rank"),
        ("all", "rank must be a whole number, or the share to keep such as 0.9"),
    ],
)
def test_impossible_ranks_are_refused(rank: Any, words: str, tmp_path: Path) -> None:
    model = adapter_on_llama()
    with pytest.raises(ConfigError, match=words):
        convert_to_lora(model, rank)
    with pytest.raises(ConfigError, match=words):
        save_as_lora(tmp_path / "new", model, rank)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
        convert_to_lora(llama(), 2)
    with pytest.raises(ValueError, match="The adapter's config sets bias=all"):
        convert_to_lora(adapter_on_llama(bias="all"), 2)
    invoked = adapter_on_llama(alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    assert not invoked.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*q_proj: it cannot be merged into a weight"):
        convert_to_lora(invoked, 2)
    prompt = get_peft_model(llama(), nbpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert not prompt.supports_lora_conversion()
    with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
        convert_to_lora(prompt, 2)
    rows = get_peft_model(llama(), nbpeft.TrainableTokensConfig(token_indices=[1]))
    with pytest.raises(ConversionError, match="embed_tokens: it trains rows of an embedding"):
        convert_to_lora(rows, 1)
    with pytest.raises(AdapterError, match="other"):
        convert_to_lora(adapter_on_llama(), 2, adapter_name="other")


def test_broken_and_merged_adapters_are_refused() -> None:
    broken = adapter_on_llama()
    next(iter(broken.manager.parameters("default"))).detach().fill_(float("nan"))
    with pytest.raises(ConversionError, match=r"'default' has non-finite values at .*q_proj"):
        convert_to_lora(broken, 2)
    grouped = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), nbpeft.LoHaConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConversionError, match="the weight of a grouped convolution is not a product"):
        convert_to_lora(grouped, 2)
    merged = get_peft_model(llama(), nbpeft.HRAConfig(r=2, **TARGETS))
    merged.merge_adapter()
    with pytest.raises(MergeError, match="unmerge before"):
        convert_to_lora(merged, 2)
    plain = adapter_on_llama(r=2)
    expected = convert_to_lora(plain, 2)[1]
    plain.merge_adapter()
    assert same_state(convert_to_lora(plain, 2)[1], expected)


def test_a_progress_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    disable_progress_bar()  # of downloads, as HF_HUB_DISABLE_PROGRESS_BARS does
    try:
        convert_to_lora(adapter_on_llama(), 2, progressbar=True)
    finally:
        enable_progress_bar()
    assert "Converting to LoRA" in capsys.readouterr().err
