"""One seed, one training: losses are those of peft with dropout, and so is the generator after loading and copying."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.utils.data import DataLoader

import nbpeft
from nbpeft.engine.contract.registry import Method, methods
from tests.tiny_models import llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
NORMS = {"target_modules": ["input_layernorm", "norm"]}
NOT_ALIKE = {
    "KaSA": "the loss of the model has its penalty, which peft leaves to the trainer",
    "MonteCLoRA": "peft draws the noise of many steps before the first",
    "QALoRA": "peft has it on GPTQ layers alone",
    "OFT": "peft does not drop what module_dropout asks for",
}
"""Methods whose losses under dropout are others than in peft, and why."""


def trained(library: Any, config: str, fields: dict[str, Any], *, steps: int = 5, **call: Any) -> Any:
    """The losses of a training from one seed, with drawn batches, and the state of the generator after it."""
    base = llama()
    torch.manual_seed(7)
    model = library.get_peft_model(base, getattr(library, config)(**fields)).train()
    batches: DataLoader[Any] = DataLoader(tokens(2 * steps, 9), batch_size=2, shuffle=True)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-3)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, **call).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, torch.get_rng_state()


def check_alike(config: str, fields: dict[str, Any], **call: Any) -> None:
    (losses, state), (wanted, state_of_peft) = (trained(one, config, fields, **call) for one in (nbpeft, peft))
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert torch.equal(state, state_of_peft)


def dropouts(method: Method) -> dict[str, float]:
    """Every dropout that a config of the method has."""
    names = [one.name for one in dataclasses.fields(method.config_class)]
    return {name: 0.1 for name in names if name.endswith("dropout")}


LEARNING = [
    method
    for method in methods()
    if method.sample_configs and hasattr(peft.PeftType, method.peft_type) and method.label not in NOT_ALIKE
]


@pytest.mark.drawn(12)
@pytest.mark.parametrize("method", LEARNING, ids=lambda method: method.label)
def test_losses_of_every_method_are_those_of_peft(method: Method) -> None:
    targets = {} if method.transforms_calls else NORMS if method.kinds.only else LINEAR
    fields = next(iter(method.sample_configs.values()))
    task = {"task_ids": torch.zeros(2, dtype=torch.long)} if method.calls.arguments else {}
    check_alike(
        method.config_class.__name__, {"task_type": "CAUSAL_LM", **targets, **fields, **dropouts(method)}, **task
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "olora"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"lora_bias": True, "init_lora_weights": False},
    ],
    ids=str,
)
def test_losses_of_lora_with_dropout(fields: dict[str, Any]) -> None:
    check_alike("LoraConfig", {"r": 4, "lora_dropout": 0.1, **LINEAR, **fields})


def test_losses_of_both_parts_of_gralora() -> None:
    check_alike("GraloraConfig", {"r": 4, "gralora_k": 2, "hybrid_r": 2, "gralora_dropout": 0.2, **LINEAR})


def moved(run: Callable[[], Any]) -> bool:
    """Whether something draws from the default generator."""
    before = torch.get_rng_state()
    run()
    return not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("config", ["LoraConfig", "LoHaConfig", "VBLoRAConfig"])
def test_loading_and_copying_draw_nothing(config: str, tmp_path: Path) -> None:
    """As in peft with ``low_cpu_mem_usage=True``; without it peft makes a new adapter first."""
    sizes = {"vector_length": 8} if config == "VBLoRAConfig" else {}
    made = nbpeft.get_peft_model(llama(), getattr(nbpeft, config)(r=4, **LINEAR, **sizes))
    made.save_pretrained(tmp_path)
    base, other = llama(), llama()
    assert not moved(lambda: nbpeft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True))
    assert not moved(lambda: made.load_adapter(str(tmp_path), "second"))
    assert not moved(lambda: made.set_adapter("second"))
    assert not moved(lambda: pickle.loads(pickle.dumps(copy.deepcopy(made))))
    assert not moved(lambda: made.delete_adapter("second"))
    if config == "LoraConfig":
        assert not moved(lambda: peft.PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=True))
