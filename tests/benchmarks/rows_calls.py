"""Time of calls of a tiny language model, where only what stands around the arithmetic counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.harness import Measure, Row, Size, timed
from tests.benchmarks.models import library

_TIMES = 10
"""Calls of one sample, each of which takes some milliseconds."""


def tiny(name: str, adapters: int = 1, **fields: Any) -> Any:
    """A Llama of four layers and 32 features with LoRA on its 28 linear layers, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=4, **shape))
    source = library(name)
    config = source.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **fields)
    wrapped = source.get_peft_model(model, config, adapter_name="a0")
    for number in range(1, adapters):
        wrapped.add_adapter(f"a{number}", config)
    return wrapped.eval()


def forward(adapters: int) -> Callable[[str, Size], Measure]:
    """A forward pass without gradients of eight tokens, with the first of some adapters."""

    def prepare(name: str, size: Size) -> Measure:
        model, ids = tiny(name, adapters), torch.arange(8).unsqueeze(0)

        @torch.no_grad()
        def once() -> None:
            model(ids)

        return lambda: timed(once, times=_TIMES)

    return prepare


def generate(name: str, size: Size) -> Measure:
    """24 new tokens, one by one."""
    model, ids = tiny(name), torch.arange(8).unsqueeze(0)
    settings: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    return lambda: timed(lambda: model.generate(input_ids=ids, **settings), times=2)


def training_step(active: int = 1, dropout: float = 0.0) -> Callable[[str, Size], Measure]:
    """Forward and backward of eight tokens."""

    def prepare(name: str, size: Size) -> Measure:
        model, ids = tiny(name, active, lora_dropout=dropout), torch.arange(8).unsqueeze(0)
        names = [f"a{number}" for number in range(active)]
        target = model if name != "peft" else model.base_model  # PEFT's model itself activates one adapter
        target.set_adapter(names)
        model.train()
        return lambda: timed(lambda: model(input_ids=ids, labels=ids).loss.backward(), times=_TIMES)

    return prepare


def merge(name: str, size: Size) -> Measure:
    """Merging and unmerging."""
    model = tiny(name)

    def once() -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    return lambda: timed(once, times=_TIMES)


TINY = "Llama of 28 adapted layers, 32 features"
ROWS = [
    Row("call", f"forward without gradients, {TINY}", "seconds", 0.85, forward(1), repeats=21),
    Row("call-sixteen", "the same with sixteen adapters on the model", "seconds", 0.85, forward(16), repeats=21),
    Row("call-generate", "24 tokens of it", "seconds", 0.9, generate),
    Row("call-step", "forward and backward of it", "seconds", 0.9, training_step(), repeats=21),
    Row("call-dropout", "the same with dropout 0.05", "seconds", 1.0, training_step(dropout=0.05), repeats=21),
    Row("call-active", "forward and backward with four adapters active", "seconds", 0.8, training_step(4), repeats=21),
    Row("call-merge", "merge and unmerge of it", "seconds", 1.0, merge, repeats=21),
]
