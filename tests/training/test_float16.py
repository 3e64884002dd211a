"""Bases in float16 train with scaled losses, whoever computes the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

import nbpeft
from nbpeft.errors import TrainingError
from tests.tiny_models import llama
from tests.training.objectives.trl_run import ROWS, filled
from tests.training.support import token_rows
from tests.training.trl_run import tiny_base, tiny_tokenizer

OPTIONS: dict[str, Any] = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "seed": 1}


def gradients(dtype: torch.dtype, objective: str, **fields: Any) -> tuple[list[torch.Tensor], str]:
    """The gradients of one step, from the weights before and after it."""
    base = (llama(seed=0) if objective == "sft" else tiny_base()).to(dtype)
    model = filled(nbpeft.get_peft_model(base, nbpeft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))).train()
    before = [part.detach().clone() for _, part in model.named_parameters() if part.requires_grad]
    rows: Any = token_rows() if objective == "sft" else ROWS
    tokenizer = None if objective == "sft" else tiny_tokenizer()
    kinds = {} if objective == "sft" else {"objective": objective}
    result = nbpeft.train(model, rows, tokenizer=tokenizer, **kinds, **OPTIONS | fields)
    after = [part.detach() for _, part in model.named_parameters() if part.requires_grad]
    return [old - new for old, new in zip(before, after, strict=True)], result.message


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("chunks", [0, 128])
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_gradients_that_float16_would_round_to_zero_are_kept(objective: str, chunks: int) -> None:
    fields: dict[str, Any] = (
        {"loss_chunk_size": chunks, "beta": 1e-3} if objective == "dpo" else {"loss_chunk_size": chunks}
    )
    exact, _ = gradients(torch.float32, objective, **fields)
    found, message = gradients(torch.float16, objective, **fields)
    assert "losses are scaled" in message
    assert error(found, exact) < 0.02


def test_adapters_side_by_side_are_refused() -> None:
    model = nbpeft.get_peft_model(llama().half(), nbpeft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    with pytest.raises(TrainingError, match="load the base in bfloat16 or float32"):
        nbpeft.train(model, token_rows(), **OPTIONS | {"learning_rate": nbpeft.sweep(0.1, 0.2)})


def test_a_new_head_in_float16_is_refused_by_its_name() -> None:
    base = tiny_base(LlamaForSequenceClassification, 3).half()
    model = nbpeft.get_peft_model(base, nbpeft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).train()
    with pytest.raises(TrainingError, match=r"'score\.\S*weight': parameters in float16 .* bfloat16 or float32"):
        nbpeft.train(model, [{"input_ids": [5, 6], "labels": 1}], **OPTIONS)
