"""Replicas of nn.DataParallel, which a Trainer makes by itself on a machine with several GPUs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import replicate

from nbpeft import AdamssConfig, GloraConfig, LoraConfig, OSFConfig, PeanutConfig, PsoftConfig, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import experts_of, llama, mixture, randomize

IDS = torch.arange(12).view(2, 6)
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "experts": {"target_modules": [], "target_parameters": experts_of("mixtral")},
    "rows": {"target_modules": [], "trainable_token_indices": [1, 2]},
    "rows and copies": {"target_modules": [], "trainable_token_indices": [1, 2], "modules_to_save": ["norm"]},
}


def replica_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What DataParallel calls on the second device, with a copy of each tensor made on this one."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def copies(tensors: Sequence[Tensor], devices: Sequence[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    return replicate(model, [0, 1])[1]


def spoil(model: nn.Module) -> None:
    """Nothing that lies on the first device may be used on the second."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_replica_computes_with_its_own_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = mixture("mixtral") if name == "experts" else llama(tie_word_embeddings=False)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(**({"r": 4, "init_lora_weights": False} | CONFIGS[name]))).train()
    with torch.no_grad():
        for parameter in model.manager.parameters("default"):
            parameter.add_(0.1)
    wanted = copy.deepcopy(model)
    replica = replica_of(model, monkeypatch)
    spoil(model)
    output = replica(input_ids=IDS).logits
    expected = wanted(input_ids=IDS).logits
    assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(model.manager.parameters("default"), wanted.manager.parameters("default"), strict=True):
        assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    "config",
    [
        AdamssConfig(r=4, num_subspaces=2, init_weights=None, target_modules=["q_proj"]),
        PeanutConfig(r=4, depth=2, init_weights=False, target_modules=["q_proj"]),
        GloraConfig(r=4, target_modules=["q_proj"]),
        OSFConfig(target_modules=["q_proj"]),
        PsoftConfig(r=4, target_modules=["q_proj"]),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_a_replica_has_the_parameters_in_lists_and_groups(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(llama(), config).eval()
    randomize(model, scale=0.1)
    expected = model(input_ids=IDS).logits
    replica = replica_of(model, monkeypatch)
    spoil(model)
    assert_close(replica(input_ids=IDS).logits, expected)
