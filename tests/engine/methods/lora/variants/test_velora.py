"""VeLoRA: outputs are LoRA's, gradients are PEFT's, and backward keeps a fraction of what theirs keeps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nbpeft.engine.methods.lora.variants.velora import DIRECTION
from nbpeft.errors import ConfigError, HotSwapError
from nbpeft.model import LoraConfig, PeftModel, VeloraConfig, get_peft_model, hotswap_adapter
from tests.closeness import assert_close, is_close
from tests.tiny_models import llama, logits, randomize, tokens

TARGETS = ["q_proj", "down_proj"]
SETTINGS: list[dict[str, Any]] = [
    {"num_groups": 4},
    {"num_groups": 5, "scale": 0.5},
    {"num_groups": 3, "init_type": "batch_average_once"},
    {"num_groups": 8, "init_type": "random"},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def velora(settings: dict[str, Any], base: nn.Module | None = None, **changes: Any) -> PeftModel:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **changes}
    model = get_peft_model(base or llama(), LoraConfig(**fields, velora_config=settings or None))
    randomize(model, scale=0.2)
    return model


def both(settings: dict[str, Any], folder: Path) -> tuple[PeftModel, Any]:
    ours = velora(settings)
    ours.save_pretrained(folder)
    return ours, peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True)


def gradients(model: Any) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def directions(model: Any) -> list[Tensor]:
    return [value for name, value in model.state_dict().items() if DIRECTION in name]


@every_setting
def test_learns_as_in_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(settings, tmp_path)
    assert_close(logits(ours.eval()), logits(theirs.eval()))
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == expected.keys() and len(found) == 8
    for name in found:
        assert_close(found[name], expected[name])
    assert_close(directions(ours), directions(theirs))
    layers = [model.base_model.model.model.layers[1].mlp.down_proj for model in (ours, theirs)]
    assert_close(*(getattr(layer, DIRECTION)["default"] for layer in layers))
    losses: list[list[float]] = [[], []]
    for model, record in zip((ours, theirs), losses, strict=True):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(8):
            optimizer.zero_grad()
            loss = model.train()(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            record.append(float(loss.detach()))
    assert_close(losses[0], losses[1])
    assert losses[0][-1] < losses[0][0]
    assert_close(logits(ours.eval()), logits(theirs.eval()))


@every_setting
def test_files_go_both_ways(settings: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(settings, tmp_path / "ours")
    gradients(ours)
    gradients(theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert mine.keys() == other.keys() and len(mine) == 12
    for name in mine:
        assert_close(mine[name], other[name])
    again = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours.eval()))
    assert_close(directions(again), directions(ours))
    config = again.peft_config["default"]
    assert config.velora_config == VeloraConfig(**settings)
    assert vars(peft.PeftConfig.from_pretrained(tmp_path / "ours").velora_config) == vars(config.velora_config)


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.4}, {"lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_all_but_the_gradient_of_A_is_that_of_LoRA(changes: dict[str, Any]) -> None:
    learned = []
    for settings in ({"num_groups": 4}, {}):
        model = velora(settings, **changes)
        torch.manual_seed(3)
        inputs = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        output = model.train()(inputs_embeds=inputs).logits
        output.square().mean().backward()
        exact = [p.grad for name, p in model.named_parameters() if p.grad is not None and "lora_A" not in name]
        learned.append((output, inputs.grad, exact))
    assert_close(learned[0], learned[1])


def test_it_is_exact_where_a_piece_is_one_feature() -> None:
    found, expected = (
        gradients(velora({"num_groups": 64}, target_modules=["down_proj"])),
        gradients(velora({}, target_modules=["down_proj"])),
    )
    assert_close(found, expected)


def test_checkpointing_and_functional_calls_give_the_same_gradients() -> None:
    plain = gradients(velora(SETTINGS[0]))
    model = velora(SETTINGS[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(value, plain[name]) for name, value in gradients(model).items())
    model = velora(SETTINGS[0]).train()
    own = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        given = {"input_ids": tokens(), "labels": tokens()}
        return torch.func.functional_call(model, parameters, (), given).loss  # type: ignore[no-any-return]

    assert_close(torch.func.grad(loss)(own), plain)


def kept_bytes(model: Any) -> int:
    """Bytes that a step keeps for backward, each storage once, without what the model holds anyway."""
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(torch.randn(2, 64, 256)).sum()
    return sum(kept.values())


def test_a_step_keeps_a_fraction_of_what_it_keeps_with_LoRA(tmp_path: Path) -> None:
    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(256, 256), nn.Dropout(0.0), nn.Linear(256, 256))

    fields: dict[str, Any] = {"r": 4, "target_modules": ["0", "2"]}
    plain = kept_bytes(get_peft_model(base(), LoraConfig(**fields)))
    settings = {"num_groups": 16}
    ours = kept_bytes(get_peft_model(base(), LoraConfig(**fields, velora_config=settings)))
    theirs = kept_bytes(peft.get_peft_model(base(), peft.LoraConfig(**fields, velora_config=settings)))
    # For each layer: of 128 tokens 256 features, or 16 lengths; and 4 of the product.
    assert plain >= 2 * 128 * 256 * 4
    assert ours <= 1.1 * 2 * 128 * (16 + 4) * 4 and ours <= theirs


def test_the_direction_of_the_first_batch_stays(tmp_path: Path) -> None:
    model = velora(SETTINGS[2])
    assert not any(one.any() for one in directions(model))
    gradients(model)
    first = copy.deepcopy(directions(model))
    model.train()(input_ids=tokens(seed=8))
    assert_close(directions(model), first)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    again(input_ids=tokens(seed=8))
    assert_close(directions(again), first)
    assert all(is_close(one.norm(), torch.ones(())) for one in first)


def test_what_does_not_go_is_refused_in_one_line(tmp_path: Path) -> None:
    model = velora(SETTINGS[0])
    model.save_pretrained(tmp_path)
    with pytest.raises(HotSwapError, match=r"has no .*lora_velora_embed"):
        hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(ConfigError, match="velora_config works on linear layers only"):
        velora({"num_groups": 2}, target_modules=["embed_tokens"])
    for settings, message in (
        ({"num_groups": 0}, "num_groups must be a positive whole number"),
        ({"scale": -1.0}, "scale must be above 0"),
        ({"init_type": "batch"}, "Did you mean 'batch_average'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoraConfig(velora_config=settings)
    with pytest.raises(ConfigError, match="use_dora cannot be combined with velora_config"):
        LoraConfig(velora_config={}, use_dora=True)
