"""Four trainings side by side beside one, and beside four in turn: SmolLM2's shape with a part of its layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbpeft import LoraConfig, get_peft_model, sweep, train
from tests.benchmarks.harness import OURS, Measure, Row, Size
from tests.memory.measured_peak import allocated_peak

_RATES = (1e-4, 2e-4, 3e-4, 5e-4)
_SHAPE = {"vocab_size": 49152, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
_TOY = {"vocab_size": 64, "intermediate_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}
ALONE = "one alone"
IN_TURN = "four in turn"


def _runs(size: Size, rows: int, tokens: int, steps: int) -> tuple[Any, Callable[[], None], Callable[..., None]]:
    """A model with the adapter ``a``, a sweep over four learning rates, and trainings of one after the other."""
    toy = size.sequence < tokens
    shape, tokens, layers = (_TOY, size.sequence, 1) if toy else (_SHAPE, tokens, 8)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=size.hidden, num_hidden_layers=layers, tie_word_embeddings=True, **shape)
    model: Any = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=16, target_modules="all-linear"), adapter_name="a"
    )
    data = [{"input_ids": torch.randint(0, 60, (tokens,)).tolist()} for _ in range(rows * steps)]
    common: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": rows, "adapter": "a"}

    def side_by_side() -> None:
        train(model, data, learning_rate=sweep(*_RATES), **common)
        model.manager.activate("a")
        for name in set(model.manager.names) - {"a"}:
            model.manager.remove(name)

    def in_turn(rates: tuple[float, ...] = _RATES) -> None:
        for rate in rates:
            train(model, data, learning_rate=rate, **common)

    return model, side_by_side, in_turn


def _peak(rows: int, tokens: int) -> Callable[[str, Size], Measure]:
    """Weights of the base and the most that torch allocates beside them."""

    def prepare(name: str, size: Size) -> Measure:
        model, side_by_side, in_turn = _runs(size, rows, tokens, steps=2)
        work = side_by_side if name == OURS else lambda: in_turn(_RATES[:1])
        weights = sum(part.nbytes for part in model.get_base_model().parameters())
        work()
        return lambda: float(weights + allocated_peak(work))

    return prepare


def _seconds(rows: int, tokens: int, steps: int) -> Callable[[str, Size], Measure]:
    """CPU time of the process, which a busy machine changes least."""

    def prepare(name: str, size: Size) -> Measure:
        _, side_by_side, in_turn = _runs(size, rows, tokens, min(steps, 2) if size.sequence < tokens else steps)
        work = side_by_side if name == OURS else in_turn

        def once() -> float:
            start = time.process_time()
            work()
            return time.process_time() - start

        return once

    return prepare


ROWS = [
    Row("sweep-peak", "4 learning rates side by side, 4 x 64 tokens: peak, beside one", "bytes", 1.6, _peak(4, 64),
        rival=ALONE, repeats=1),
    Row("sweep-short-peak", "the same, 2 x 32 tokens", "bytes", 1.6, _peak(2, 32), rival=ALONE, repeats=1),
    Row("sweep-time", "4 x 20 steps side by side, 4 x 64 tokens: CPU time, beside four in turn", "seconds", 0.9,
        _seconds(4, 64, 20), rival=IN_TURN, repeats=2),
    Row("sweep-short-time", "the same, 2 x 32 tokens", "seconds", 0.9, _seconds(2, 32, 20), rival=IN_TURN, repeats=2),
]  # fmt: skip
