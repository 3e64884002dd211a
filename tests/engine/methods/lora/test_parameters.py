"""LoRA on bare parameters: its layout, padding, checkpointing, exports, forecasts, and what a step keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nbpeft import LoraConfig, PeftModel, get_peft_model, hotswap_adapter, prepare_model_for_compiled_hotswap
from nbpeft.errors import ConversionError
from nbpeft.memory.forecast import forecast
from nbpeft.model.combine.conversion import convert_to_lora
from nbpeft.model.saving.merge_export import merge_to_folder
from nbpeft.model.swapping.pool import AdapterPool
from nbpeft.session.preview import preview_of
from nbpeft.shipping.facts import facts_of
from tests.closeness import assert_approximates, assert_close, differ, is_close
from tests.tiny_models import experts_of, logits, mixture, randomize, tokens


def adapted(model_type: str = "qwen3_moe", way: str = "eager", **changes: Any) -> Any:
    fields = {"r": 4, "target_modules": [], "target_parameters": experts_of(model_type), "init_lora_weights": False}
    return get_peft_model(mixture(model_type, way), LoraConfig(**fields | changes)).eval()


def test_factors_of_an_expert_lie_in_a_and_b_as_in_peft() -> None:
    model = adapted("mixtral")
    experts = model.get_base_model().model.layers[0].mlp.experts
    first, second = experts.lora_A["default"].weight, experts.lora_B["default"].weight
    delta = experts.get_delta_weight("default")
    for expert in range(4):
        expected = second[:, expert::4] @ first[4 * expert : 4 * expert + 4] * experts.scaling["default"]
        assert_close(delta[expert], expected)


def test_gaussian_starts_draw_a_with_the_rank_and_change_nothing() -> None:
    model = adapted(r=4, init_lora_weights="gaussian")
    experts = model.get_base_model().model.layers[0].mlp.experts
    assert_approximates(experts.lora_A["default"].weight.std(), torch.tensor(0.25), 0.15)
    assert torch.equal(logits(model), logits(mixture("qwen3_moe")))


def test_slots_are_padded_and_saved_without_padding(tmp_path: Path) -> None:
    small, large = adapted(r=2, rank_pattern={"experts.down_proj": 1}), adapted(r=4)
    expected = logits(small)
    prepare_model_for_compiled_hotswap(small, target_rank=4)
    assert_close(logits(small), expected)
    small.save_pretrained(str(tmp_path / "small"))
    again = PeftModel.from_pretrained(mixture("qwen3_moe"), str(tmp_path / "small")).eval()
    assert torch.equal(logits(again), expected)
    large.save_pretrained(str(tmp_path / "large"))
    hotswap_adapter(small, str(tmp_path / "large"), "default")
    assert_close(logits(small), logits(large))


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_checkpointed_layers_give_the_same_gradients(way: str) -> None:
    model = adapted(way=way).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return [parameter.grad.clone() for parameter in model.manager.parameters("default")]

    expected = gradients()
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert all(torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True))


@pytest.mark.slow
def test_compiled_models_compute_experts_as_they_are() -> None:
    model = adapted()
    expected = logits(model)
    assert_close(logits(torch.compile(model, backend="eager")), expected)
    with model.disable_adapter():
        plain = logits(model)
    assert differ(plain, expected)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_merged_folders_hold_the_changed_experts(model_type: str, tmp_path: Path) -> None:
    model = adapted(model_type)
    merged = merge_to_folder(model, None, tmp_path)
    again = type(model.get_base_model()).from_pretrained(str(tmp_path)).eval()
    assert_close(logits(again), logits(model))
    assert merged.errors is not None
    assert {layer.path.rpartition(".")[2] for layer in merged.errors.layers} == {"gate_up_proj", "down_proj"}


def test_half_precision_experts_train_in_single_precision() -> None:
    base = mixture("qwen3_moe", "grouped_mm").to(torch.bfloat16)
    fields: Any = {"r": 4, "target_modules": [], "target_parameters": experts_of("qwen3_moe")}
    model = get_peft_model(base, LoraConfig(**fields))
    parameters = model.manager.parameters("default")
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert {p.dtype for p in parameters} == {torch.float32} and all(p.grad is not None for p in parameters)


def test_previews_and_forecasts_count_experts() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts_of("qwen3_moe"))
    shown = preview_of(mixture("qwen3_moe"), config, name="a", model_name="model", replaces=False, notes=[])
    row = next(row for row in shown.rows if row.target == "gate_up_proj")
    assert (row.shapes, row.ranks, row.parameter_count) == (("6 × 48 × 32",), (4,), 2 * 4 * 6 * (48 + 32))
    base = mixture("qwen3_moe", "grouped_mm")
    plain = LoraConfig(r=4, target_modules=["q_proj"])
    needed = [forecast(base, chosen, max_length=32, dtype="bfloat16") for chosen in (plain, config)]
    assert needed[0].peak_bytes < needed[1].peak_bytes


def saved_for_backward(experts: int, way: str) -> int:
    """Bytes that a step of training keeps for its backward, what is part of the model left out."""
    model = get_peft_model(
        mixture("qwen3_moe", way, num_experts=experts),
        LoraConfig(r=2, target_modules=[], target_parameters=experts_of("qwen3_moe")),
    ).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens(1, 4)).logits.sum()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_idle_experts_keep_no_memory_in_a_step(way: str) -> None:
    few, many = saved_for_backward(8, way), saved_for_backward(64, way)
    weights = 2 * 56 * 4 * (48 * 32 + 32 * 24)  # of 56 more experts in two layers, in bytes
    assert many - few < 0.02 * weights


def test_pools_serve_adapters_of_experts(tmp_path: Path) -> None:
    expected = {}
    for seed, name in enumerate("abc"):
        model = adapted()
        randomize(model, seed=seed, scale=0.1)
        model.save_pretrained(str(tmp_path / name))
        expected[name] = logits(model)
    size = sum(parameter.nbytes for parameter in model.manager.parameters("default"))
    folders = {name: tmp_path / name for name in expected}
    pool = AdapterPool(mixture("qwen3_moe"), 2 * size / 1e6, host_limit_mb=100, adapters=folders)
    for name in "abcab":
        pool.set_adapter(name)
        assert torch.equal(logits(pool.model), expected[name])


def test_conversions_and_shipping_refuse_experts_in_one_line() -> None:
    model = adapted()
    with (
        pytest.warns(UserWarning, match="already a LoRA adapter"),
        pytest.raises(ConversionError, match=r"bare parameters .* have a LoRA of their own"),
    ):
        convert_to_lora(model, rank=2)
    assert facts_of(model.manager, "default").others == {"target_parameters": 4}


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_dropout_acts_on_what_goes_into_each_expert(model_type: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same features are dropped of all tokens, which is the same as to drop those columns of A."""
    model, other = (adapted(model_type, way, lora_dropout=share) for share in (0.5, 0.0))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))

    def mask(size: int) -> Tensor:
        return 2.0 * (torch.arange(size) % 2)

    def dropped(x: Tensor, share: float = 0.0, **of_attention: Any) -> Tensor:
        if of_attention:
            return x
        assert share == 0.5
        return x * (mask(x.shape[-2])[:, None] if x.shape[-1] == 1 else mask(x.shape[-1]))

    monkeypatch.setattr("nbpeft.engine.wrappers.factored_weight.F.dropout", dropped)
    found = logits(model.train())
    with torch.no_grad():
        for name, factor in other.named_parameters():
            if "lora_A" in name:
                factor.mul_(mask(factor.shape[1]))
    assert_close(found, logits(other))
    assert differ(found, logits(model.eval()))


def test_dropout_is_drawn_again_alike_where_layers_are_computed_again() -> None:
    model = adapted("qwen3_moe", "grouped_mm", lora_dropout=0.5).train()

    def gradients() -> list[Any]:
        model.zero_grad()
        torch.manual_seed(7)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return [parameter.grad.clone() for parameter in model.manager.parameters("default")]

    expected, again = gradients(), gradients()
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert all(map(torch.equal, expected, again)) and all(map(is_close, expected, checkpointed))
