"""A tiny Llama with an adapter, rows for it, and a clock that the test moves."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbpeft.model import LoraConfig, get_peft_model

torch.set_num_threads(1)
VOCABULARY = 97


def tiny_base(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**(settings | config)))
    return model.to(dtype)


def adapt(base: Any, name: str = "default", **config: Any) -> Any:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 4}
    return get_peft_model(base, LoraConfig(**(settings | config)), adapter_name=name)


def tiny_model(seed: int = 0, **config: Any) -> Any:
    return adapt(tiny_base(seed), **config)


def token_rows(count: int = 32, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: part.detach().clone() for name, part in model.named_parameters() if part.requires_grad}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
