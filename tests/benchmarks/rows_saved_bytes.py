"""Bytes that a forward keeps for the backward, counted exactly."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.selective_recompute import selective_recompute
from tests.benchmarks.harness import OURS, Measure, Row, Size
from tests.benchmarks.models import adapted, smollm2_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Address -> bytes of the distinct storages under some tensors."""
    memory = [part.untyped_storage() for tensor in tensors for part in _dense_parts(tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in memory if storage.nbytes()}


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    """The tensor, or the indices and values of a sparse one."""
    return [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]


def live_tensors() -> list[Tensor]:
    """Every tensor that Python code holds: also those a backward could hide from autograd's hooks."""
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes in distinct storages kept for the backward, without what was there before (parameters, input)."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    gc.collect()
    before = storages(live_tensors())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    kept = storages([*saved, *(tensor for tensor in live_tensors() if tensor is not output)])
    output.sum().backward()
    return sum(size for address, size in kept.items() if address not in before)


def backbone(dtype: torch.dtype, dropout: float, *, recompute: bool = False) -> Callable[[str, Size], Measure]:
    """Four layers of SmolLM2 with LoRA on all their linear layers; ours with ``selective_recompute`` if wanted."""

    def prepare(name: str, size: Size) -> Measure:
        model = adapted(name, smollm2_layers(size.hidden, dtype), target_modules=TARGETS, lora_dropout=dropout)
        inputs = torch.randn(1, size.sequence, size.hidden).to(dtype).requires_grad_()

        def count() -> int:
            with selective_recompute(model) if recompute and name == OURS else nullcontext():
                return saved_bytes(lambda: model(inputs_embeds=inputs).last_hidden_state)

        return count

    return prepare


ROWS = [
    Row(
        f"saved-{name}",
        f"saved for backward, {name.replace('-', ', ')}",
        "bytes",
        target,
        backbone(dtype, dropout, recompute="recompute" in name),
        repeats=1,
    )
    for name, dtype, dropout, target in (
        ("bf16-dropout", torch.bfloat16, 0.1, 0.45),
        ("bf16", torch.bfloat16, 0.0, 0.65),
        ("fp32-dropout", torch.float32, 0.1, 0.62),
        ("bf16-dropout-recompute", torch.bfloat16, 0.1, 0.25),
        ("bf16-recompute", torch.bfloat16, 0.0, 0.35),
        ("fp32-recompute", torch.float32, 0.0, 0.6),
    )
]
