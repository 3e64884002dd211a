"""Scoring the base and four adapters in the same batches, beside scoring them one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbpeft import LoraConfig, get_peft_model, score
from tests.benchmarks.harness import OURS, Measure, Row, Size
from tests.char_tokenizer import CharTokenizer

_SHAPE = {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
_TOY = {"intermediate_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}
_ADAPTERS = ("a", "b", "c", "d")
IN_TURN = "five passes"


def _seconds(batch_size: int, tokens: int) -> Callable[[str, Size], Measure]:
    """CPU time of the process, which a busy machine changes least."""

    def prepare(name: str, size: Size) -> Measure:
        toy = size.sequence < 64
        torch.manual_seed(0)
        shape = {"vocab_size": 97, "hidden_size": size.hidden, "num_hidden_layers": 1 if toy else 8}
        config = LlamaConfig(**shape, **(_TOY if toy else _SHAPE), eos_token_id=96)
        settings: Any = {"r": 16, "target_modules": "all-linear", "init_lora_weights": False}
        model: Any = get_peft_model(LlamaForCausalLM(config), LoraConfig(**settings), _ADAPTERS[0])
        for other in _ADAPTERS[1:]:
            model.add_adapter(other, LoraConfig(**settings))
        rows = [{"prompt": f"{n} and {'x' * (n % 7)}", "completion": "y"} for n in range(4 if toy else 2 * batch_size)]
        given: dict[str, Any] = {"tokenizer": CharTokenizer(), "progress": False, "batch_size": batch_size}
        given["max_new_tokens"] = 2 if toy else tokens

        def once() -> float:
            start = time.process_time()
            if name == OURS:
                score(model, rows, **given)
            else:
                score(model, rows, adapters=[], **given)
                for adapter in _ADAPTERS:
                    score(model, rows, adapters=adapter, include_base=False, **given)
            return time.process_time() - start

        return once

    return prepare


ROWS = [
    Row("score-8", "the base and 4 adapters scored, 8 rows at a time: CPU time, beside one after the other", "seconds",
        0.6, _seconds(8, 32), rival=IN_TURN, repeats=3),
]  # fmt: skip
