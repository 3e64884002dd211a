"""What saves time or memory changes no result: each optimization is switched off, on drawn models and configs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nbpeft import (
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
    sweep,
    train,
)
from tests.closeness import assert_close, is_close
from tests.tiny_models import config, gpt2, llama, logits, randomize, tokens
from tests.training.support import token_rows

BASES: dict[str, Any] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True, attention_bias=False),
    "mlp bias": lambda: llama(mlp_bias=True, num_key_value_heads=1, hidden_act="gelu"),
    "gpt2": lambda: gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=0),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rank-stabilized": {"use_rslora": True, "r": 2},
    "bias": {"lora_bias": True},
    "head": {"modules_to_save": ["lm_head"]},
}
SLOWEST: dict[str, Any] = {"loss_chunk_size": 0, "recompute": False, "train_sampling_strategy": "sequential"}
"""A training without optimizations."""
SWITCHES: dict[str, dict[str, Any]] = {
    "chunked loss": {"loss_chunk_size": 5},
    "recompute": {"recompute": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "batches by length": {"train_sampling_strategy": "group_by_length"},
    "packing": {"packing": True, "max_length": 32},
    "all": {"loss_chunk_size": 5, "recompute": True, "train_sampling_strategy": "group_by_length"},
}
# Each step has all rows, so that their distribution over batches does not change it. SGD does not amplify rounding.
GIVEN: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 99}
GIVEN |= {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
BITS = ("checkpointing",)
"""What repeats the same computations."""


def model_of(base: str, changes: dict[str, Any], name: str = "a") -> Any:
    targets = ["c_attn", "c_fc"] if base == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    made = BASES[base]()
    torch.manual_seed(1)
    return get_peft_model(made, config(target_modules=targets, **changes), name)


def weights(model: Any, name: str) -> list[Tensor]:
    return [part.detach().clone() for part in model.manager.parameters(name)]


def close(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(is_close(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.drawn(3)
@pytest.mark.parametrize(("base", "changes"), list(itertools.product(BASES, CONFIGS)))
def test_an_optimization_changes_no_result(base: str, changes: str) -> None:
    rows, settings = token_rows(7, len(base) + len(changes)), CONFIGS[changes]
    slow = model_of(base, settings)
    before = weights(slow, "a")
    losses = train(slow, rows, **GIVEN | SLOWEST).state.history
    learned = weights(slow, "a")
    assert not close(before, learned)
    for name, switch in SWITCHES.items():
        if name == "packing" and base == "gpt2":  # whose attention mixes packed rows
            continue
        fast = model_of(base, settings)
        result = train(fast, rows, **GIVEN | SLOWEST | switch)
        same = (
            all(map(torch.equal, weights(fast, "a"), learned)) if name in BITS else close(weights(fast, "a"), learned)
        )
        assert same, name
        assert_close([loss for _, loss in result.state.history], [loss for _, loss in losses], message=name)
    together = model_of(base, settings)
    train(together, rows, **GIVEN | SLOWEST | {"learning_rate": sweep(0.5, 0.1)})
    assert close(weights(together, "a-lr5e-1"), learned)
    _check_served(together, slow)
    _check_swapped(base, settings, slow)


def _check_served(model: Any, alone: Any) -> None:
    """The rows of a mixed batch have the logits of each adapter alone."""
    ids, model = tokens(3), model.eval()
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["a-lr5e-1", "a-lr1e-1", "__base__"]).logits
        assert_close(mixed[:1], logits(alone.eval(), ids[:1]))
        with model.disable_adapter():
            assert_close(mixed[2:], logits(model, ids[2:]))
        model.set_adapter("a-lr1e-1")
        assert_close(mixed[1:2], logits(model, ids[1:2]))


def _check_swapped(base: str, settings: dict[str, Any], trained: Any) -> None:
    """An adapter of lower rank that is swapped into a padded one has its own logits."""
    if "modules_to_save" in settings:  # whole layers have no rank
        return
    low = model_of(base, settings | {"r": 1})
    randomize(low, "a")
    prepare_model_for_compiled_hotswap(trained, target_rank=6)
    hotswap_adapter_from_state_dict(
        trained, get_peft_model_state_dict(low, adapter_name="a"), "a", low.peft_config["a"]
    )
    assert_close(logits(trained.eval(), tokens(2)), logits(low.eval(), tokens(2)))
