"""The models that rows measure on: many small layers, one wide layer, layers of a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.harness import library


class Block(nn.Module):
    """One layer to adapt, called ``proj``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.utils.skip_init(nn.Linear, width, width)
        with torch.no_grad():
            self.proj.weight.fill_(0.01)
            self.proj.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Chain(nn.Module):
    """``count`` blocks, one after the other."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def layers(width: int, dtype: torch.dtype = torch.float32, count: int = 1) -> Chain:
    """A model of one or more layers with random weights that are not to be trained."""
    torch.manual_seed(0)
    model = Chain(count, width)
    for weight in (parameter for parameter in model.parameters() if parameter.ndim == 2):
        nn.init.normal_(weight, std=width**-0.5)
    return model.to(dtype).requires_grad_(False)


def smollm2_layers(hidden: int, dtype: torch.dtype, count: int = 4) -> nn.Module:
    """``count`` layers shaped like those of SmolLM2-135M (hidden size 576), without the head."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=count,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=64,
        use_cache=False,
    )
    return LlamaModel(config).requires_grad_(False).to(dtype=dtype)


def with_adapters(name: str, model: nn.Module, count: int, **fields: Any) -> Any:
    """The model with ``count`` LoRA adapters of one library, called a0, a1, ..."""
    source = library(name)
    settings: dict[str, Any] = {"target_modules": ["proj"], **fields}
    wrapped = source.get_peft_model(model, source.LoraConfig(**settings), adapter_name="a0")
    for number in range(1, count):
        wrapped.add_adapter(f"a{number}", source.LoraConfig(**settings))
    return wrapped


def adapted(name: str, model: nn.Module, **fields: Any) -> Any:
    """The model with a LoRA adapter of one library, ready to train; B is not zero, as after some steps."""
    source = library(name)
    config = source.LoraConfig(**{"r": 16, "lora_alpha": 32, "target_modules": ["proj"], **fields})
    wrapped = source.get_peft_model(model, config)
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=0.02)
    return wrapped.train()
