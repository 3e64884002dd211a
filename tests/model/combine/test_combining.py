"""``add_weighted_adapter`` on models: PEFT's numbers, and right where PEFT's are not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import nbpeft
from nbpeft.errors import AdapterError, AdapterExistsError, ConfigError, UnknownAdapterError
from nbpeft.model import Combined, PeftModel, get_peft_model
from nbpeft.names import COMBINATION_TYPES
from tests.closeness import assert_close
from tests.tiny_models import adapted, classifier, config, gpt2, llama, logits, randomize, tokens

PEFT_TYPES = [name for name in COMBINATION_TYPES if name != "exact"]
BASES: dict[str, tuple[Any, list[str]]] = {
    "llama": (llama, ["q_proj", "v_proj", "embed_tokens"]),
    "gpt2": (gpt2, ["c_attn", "wte"]),
}


def both(tmp_path: Path, base: str, ranks: dict[str, int], **options: Any) -> tuple[PeftModel, Any]:
    """The same adapters, in PEFT and here."""
    make, targets = BASES[base]
    oracle: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position, (name, rank) in enumerate(ranks.items()):
            settings = peft.LoraConfig(
                r=rank, lora_alpha=rank + position, target_modules=targets, init_lora_weights=False, **options
            )
            if oracle is None:
                oracle = peft.get_peft_model(make(), settings, adapter_name=name)
            else:
                oracle.add_adapter(name, settings)
        oracle.save_pretrained(tmp_path)
        first, *others = ranks
        model = PeftModel.from_pretrained(make(), tmp_path / first, first)
        for name in others:
            model.load_adapter(tmp_path / name, name)
    return model, oracle.eval()


@pytest.mark.drawn(10)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_equals_peft_under_the_same_seed(kind: str, base: str, tmp_path: Path) -> None:
    model, oracle = both(tmp_path, base, {"one": 4, "two": 4})
    options: dict[str, Any] = {} if kind in ("svd", "cat", "linear") else {"density": 0.6}
    for each in (model, oracle):
        torch.manual_seed(3)
        each.add_weighted_adapter(["one", "two"], [0.7, -0.4], "mix", combination_type=kind, **options)
        each.set_adapter("mix")
    assert_close(logits(model), logits(oracle))


def test_the_result_is_frozen_inactive_and_saved_as_peft_reads_it(tmp_path: Path) -> None:
    model, _ = both(tmp_path, "llama", {"one": 4, "two": 2})
    before, active = logits(model), model.active_adapters
    result = model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "mix")
    assert isinstance(result, Combined) and result.rank == 4 and model.active_adapters == active
    assert torch.equal(logits(model), before)
    assert not any(parameter.requires_grad for parameter in model.manager.parameters("mix"))
    model.set_adapter("mix")
    model.save_pretrained(tmp_path / "saved", selected_adapters=["mix"])
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "saved" / "mix")
    assert_close(logits(theirs), logits(model))


@torch.no_grad()
def weighted(model: PeftModel, weights: dict[str, float]) -> Tensor:
    """Logits with the adapters acting together at these strengths."""
    for name, weight in weights.items():
        model.manager.set_scale(name, weight)
    with model.use(list(weights)):
        output = logits(model)
    for name in weights:
        model.manager.set_scale(name, 1.0)
    return output


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_exact_is_the_adapters_acting_together(use_dora: bool, use_rslora: bool, tmp_path: Path) -> None:
    model = adapted(name="one", use_dora=use_dora, use_rslora=use_rslora)
    model.add_adapter("two", config(r=6, lora_alpha=2, target_modules=["q_proj", "down_proj"], use_rslora=use_rslora))
    model.add_adapter("three", config(r=2, target_modules=["v_proj"], use_dora=use_dora))
    model.eval()
    if use_dora:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("magnitude_vector"):
                parameter.data.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    weights = {"one": 0.6, "two": -0.5, "three": 1.3}
    expected = weighted(model, weights)
    result = model.add_weighted_adapter(list(weights), list(weights.values()), "mix", combination_type="exact")
    assert result.relative_error < 1e-5
    assert_close(result.energy_kept, 1)
    assert result.rank == 12 and "nothing lost" in str(result)
    model.set_adapter("mix")
    assert_close(logits(model), expected)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    restored = PeftModel.from_pretrained(llama(), tmp_path / "mix")
    assert_close(logits(restored), logits(model))


def test_a_truncated_sum_says_what_it_lost() -> None:
    model = adapted(name="one")
    model.add_adapter("two", config(r=4))
    result = model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", combination_type="exact", svd_rank=2)
    assert result.rank == 2 and 0 < result.worst.relative_error < 1
    for layer in result.layers:
        assert_close(layer.energy_kept, 1 - layer.relative_error**2)
    assert result.layers[0].path == "model.layers.0.self_attn.q_proj"
    assert not any(isinstance(value, Tensor | nn.Module) for value in vars(result).values())


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "exact"])
@pytest.mark.parametrize("kinds", [(True, True), (False, True)])
def test_losses_count_what_dora_makes_of_the_factors(kinds: tuple[bool, bool], kind: str) -> None:
    model = adapted(llama(), r=4, target_modules=["q_proj"], use_dora=kinds[0])
    model.add_adapter("two", nbpeft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=kinds[1]))
    for name in ("default", "two"):
        randomize(model, name)
    layers = model.manager.layers
    for layer in layers.values():
        for adapter in layer.adapters.values():
            for key, tensor in adapter.named_parameters():
                if "magnitude" in key:
                    tensor.data *= 1.5
    combined = model.add_weighted_adapter(["default", "two"], [1.0, 0.5], "mix", combination_type=kind)
    missed = whole = 0.0
    for layer in layers.values():
        true = layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("two")
        missed += float((layer.get_delta_weight("mix") - true).norm() ** 2)
        whole += float(true.norm() ** 2)
    assert_close(combined.relative_error, (missed / whole) ** 0.5, scale=1.0)
    assert ("nothing lost" in str(combined)) == (kind == "exact")


def test_10_rslora_is_not_scaled_twice() -> None:
    """PEFT keeps use_rslora in the result's config and so scales it by another sqrt(r)."""
    model = adapted(name="one", use_rslora=True, r=8)
    model.add_adapter("two", config(r=8, use_rslora=True))
    expected = weighted(model, {"one": 0.5, "two": 0.5})
    for kind in ("cat", "exact"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], kind, combination_type=kind)
        with model.use(kind):
            assert_close(logits(model), expected)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "full", combination_type="svd", svd_rank=16)
    with model.use("full"):
        assert_close(logits(model), expected)


@pytest.mark.parametrize("kind", ["linear", "svd", "cat", "exact", "ties"])
def test_11_a_combination_with_rank_patterns_loads_again(kind: str, tmp_path: Path) -> None:
    """PEFT writes tensors of the pattern's rank under a config of the largest."""
    pattern: dict[str, Any] = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    model = adapted(name="one", **pattern)
    model.add_adapter("two", config(**pattern))
    model.eval()
    density = 0.5 if kind == "ties" else None
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", combination_type=kind, density=density)
    model.set_adapter("mix")
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = PeftModel.from_pretrained(llama(), tmp_path / "mix")
    assert_close(logits(restored), logits(model))


@pytest.mark.drawn(8)
@pytest.mark.parametrize("kind", ["linear", "svd", "cat", "exact"])
@pytest.mark.parametrize("fields", ["use_dora", "lora_bias", "use_rslora use_dora", "use_rslora lora_bias"])
def test_22_one_adapter_at_full_weight_stays_itself(fields: str, kind: str, tmp_path: Path) -> None:
    """PEFT scales rsLoRA's result again and loses DoRA's magnitudes and the biases (peft #3761, #3737)."""
    pattern: dict[str, Any] = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    model = adapted(name="one", **dict.fromkeys(fields.split(), True), **pattern)
    for name, parameter in model.named_parameters():
        if name.endswith("magnitude_vector"):
            parameter.data.mul_(1.2)
    expected = weighted(model, {"one": 1.0})
    model.add_weighted_adapter(["one"], [1.0], "same", combination_type=kind)
    model.set_adapter("same")
    assert_close(logits(model), expected)
    model.save_pretrained(tmp_path, selected_adapters=["same"])
    restored = PeftModel.from_pretrained(llama(), tmp_path / "same")
    assert_close(logits(restored), expected)


@pytest.mark.parametrize(("first", "kind"), [("biased", "exact"), ("dora", "exact"), ("dora", "linear")])
def test_a_bias_that_dora_would_drop_is_refused(first: str, kind: str) -> None:
    model = adapted(name="biased", lora_bias=True)
    model.add_adapter("dora", config(use_dora=True))
    names = [first, "dora" if first == "biased" else "biased"]
    with pytest.raises(ConfigError, match="DoRA does not support the bias; remove one of them"):
        model.add_weighted_adapter(names, [0.5, 1.0], "mix", combination_type=kind)
    assert list(model.peft_config) == ["biased", "dora"]


@pytest.mark.parametrize("name", ["a", "lora", "q_proj"])
def test_5_combining_under_any_name_leaves_the_others_alone(name: str) -> None:
    """PEFT freezes every parameter whose name contains the new adapter's."""
    model = adapted(name="one")
    model.add_adapter("two", config())
    trains = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], name)
    after = {
        key: p.requires_grad
        for key, p in model.named_parameters()
        if f"_A.{name}." not in key and f"_B.{name}." not in key
    }
    assert after == trains


def test_the_one_trained_head_goes_along() -> None:
    model = adapted(classifier(), "one", task_type="SEQ_CLS")
    model.manager.add("two", config())
    model.eval()
    with torch.no_grad():
        for parameter in model.manager.weights("one").copies["score"].values():
            parameter.add_(1.0)
    expected = logits(model)
    model.add_weighted_adapter(["one", "two"], [1.0, 0.0], "mix", combination_type="exact")
    model.set_adapter("mix")
    assert_close(logits(model), expected)


def test_what_is_refused_changes_nothing() -> None:
    model = adapted(classifier(), "one", task_type="SEQ_CLS")
    model.add_adapter("two", config(task_type="SEQ_CLS"))
    before = model.peft_config.copy()
    with pytest.raises(AdapterError, match="'one' and 'two' each trained their own score"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix")
    with pytest.raises(UnknownAdapterError, match="'twoo' not found"):
        model.add_weighted_adapter(["one", "twoo"], [0.5, 0.5], "mix")
    with pytest.raises(AdapterExistsError, match="Adapter with name 'two' already exists"):
        model.add_weighted_adapter(["one"], [0.5], "two")
    with pytest.raises(AdapterError, match="as many weights"):
        model.add_weighted_adapter(["one"], [0.5, 0.1], "mix")
    assert model.peft_config == before


def test_half_precision_adapters_stay_half() -> None:
    base: nn.Module = llama()
    base.to(torch.bfloat16)
    model = get_peft_model(base, config(), "one", autocast_adapter_dtype=False).eval()
    model.add_adapter("two", config(), autocast_adapter_dtype=False)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", combination_type="exact")
    assert {parameter.dtype for parameter in model.manager.parameters("mix")} == {torch.bfloat16}
    model.set_adapter("mix")
    assert torch.isfinite(logits(model, tokens())).all()
