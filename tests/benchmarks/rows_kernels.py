"""Kernels of forward and backward, counted: on a card each takes the host some microseconds to start.

No card is needed. The ``card`` rows compute on the CPU what a card would compute (``products.launches_count``), and
count the operations that move numbers; views and allocations start no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nbpeft.engine.methods.lora import products
from tests.benchmarks.harness import OURS, Measure, Row, Size
from tests.benchmarks.models import library

_aten = torch.ops.aten
_WITHOUT_KERNEL = {
    *(_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default),
    *(_aten.new_empty_strided.default, _aten.detach.default, _aten._unsafe_view.default, _aten.lift_fresh.default),
}


class Kernels(TorchDispatchMode):
    """Counts the operations inside of its block for which a card starts a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func in _WITHOUT_KERNEL)
        return func(*args, **(kwargs or {}))


def counted(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Kernels of a forward pass and of its backward pass, after one of each."""
    output = forward()
    output.backward(torch.ones_like(output))
    model.zero_grad()
    with Kernels() as before:
        output = forward()
    upstream = torch.ones_like(output)
    with Kernels() as behind:
        output.backward(upstream)
    return before.count, behind.count


@dataclass(frozen=True)
class Case:
    """The dtypes of a layer and its adapter, dropout, and whether autocast to bfloat16 is on."""

    layer: torch.dtype
    adapter: torch.dtype
    dropout: float = 0.0
    autocast: bool = False

    def adapted(self, name: str, base: nn.Module, targets: Any) -> Any:
        """A model in training mode with LoRA."""
        source = library(name)
        config = source.LoraConfig(r=16, lora_alpha=32, target_modules=targets, lora_dropout=self.dropout)
        wide = self.adapter == torch.float32
        return source.get_peft_model(base.to(self.layer), config, autocast_adapter_dtype=wide).train()


def _simulated(name: str, card: bool) -> Any:
    return patch.object(products, "launches_count", lambda device: True) if card and name == OURS else nullcontext()


def layer(case: Case, part: int, *, card: bool) -> Callable[[str, Size], Measure]:
    """One linear layer: kernels of forward (0) or backward (1)."""

    def prepare(name: str, size: Size) -> Measure:
        torch.manual_seed(0)
        model = case.adapted(name, nn.Sequential(nn.Linear(size.hidden, size.hidden, bias=False)), ["0"])
        x = torch.randn(size.sequence, size.hidden).to(case.layer)

        def forward() -> Tensor:
            # A new block for each pass, as in a training: autocast keeps the casts of weights to its end.
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                output: Tensor = model(x.detach().requires_grad_())
            return output

        def once() -> float:
            with _simulated(name, card):
                return float(counted(model, forward)[part])

        return once

    return prepare


def step(case: Case, *, card: bool) -> Callable[[str, Size], Measure]:
    """Forward and backward of a Llama of four layers with a loss, 28 layers adapted."""

    def prepare(name: str, size: Size) -> Measure:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=4, **shape))
        model, ids = case.adapted(name, base, "all-linear"), torch.arange(8).unsqueeze(0)

        def once() -> float:
            with _simulated(name, card):
                return float(sum(counted(model, lambda: model(input_ids=ids, labels=ids).loss)))

        return once

    return prepare


_FLOAT, _HALF = torch.float32, torch.bfloat16
CASES = {
    "float32": Case(_FLOAT, _FLOAT),
    "bfloat16 with float32": Case(_HALF, _FLOAT),
    "bfloat16": Case(_HALF, _HALF),
    "autocast": Case(_FLOAT, _FLOAT, autocast=True),
}


def _rows() -> Iterator[Row]:
    for name, case in CASES.items():
        for dropout, drops in ((0.0, ""), (0.05, ", dropout")):
            with_dropout = replace(case, dropout=dropout)
            for place, target in (("card", 1.0), ("cpu", 2.0)):
                for part, direction in enumerate(("forward", "backward")):
                    short = f"{place}-{direction}-{name.replace(',', '').replace(' ', '-')}{drops.replace(', ', '-')}"
                    title = f"kernels of a layer, {place}, {direction}, {name}{drops}"
                    measure = layer(with_dropout, part, card=place == "card")
                    yield Row(f"kernels-{short}", title, "kernels", target, measure, repeats=1)
    half = Case(_HALF, _FLOAT, 0.05)
    title = "kernels of a step, card, four decoder layers, bfloat16, dropout"
    yield Row("kernels-step", title, "kernels", 1.0, step(half, card=True), repeats=1)


ROWS = [*_rows()]
