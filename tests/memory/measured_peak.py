"""The peak of a real step, as torch's allocator saw it: what forecasts are compared with."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import GemmaConfig, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from nbpeft.engine.calls.selective_recompute import selective_recompute
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import linear_layers_to_quantize
from nbpeft.losses import chunked_loss
from nbpeft.memory import measure
from nbpeft.memory.architecture import Architecture
from nbpeft.memory.devices import mark_peak, peak
from nbpeft.memory.saved import SavedTensors
from nbpeft.names import LOSS_CHUNK_SIZE

SMALL: dict[str, Any] = dict(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
SHAPES: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    "gemma": GemmaConfig(**SMALL, head_dim=32),
    "gpt2": GPT2Config(
        vocab_size=2048, n_embd=128, n_layer=4, n_head=4, n_positions=2048, bos_token_id=0, eos_token_id=1
    ),
}  # fmt: skip


def real_model(architecture: Architecture, dtype: torch.dtype, quantization: str | None, double: bool) -> nn.Module:
    """The model with random weights, its linear layers quantized by bitsandbytes."""
    torch.manual_seed(0)
    model = architecture.build(dtype)
    if quantization is not None:
        for path, layer in linear_layers_to_quantize(model).items():
            model.set_submodule(path, _quantized(layer, quantization, double, dtype))
    return model


def _quantized(layer: Any, kind: str, double: bool, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    bnb: Any = bitsandbytes
    weight = layer.weight.detach()
    if type(layer).__name__ == "Conv1D":
        weight = weight.t().contiguous()
    rows, columns = weight.shape
    bias = layer.bias is not None
    new: Any
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(columns, rows, bias=bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(
            columns, rows, bias=bias, compute_dtype=dtype, quant_type=kind, compress_statistics=double
        )
        new.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type=kind, compress_statistics=double, module=new
        )
    if bias:
        new.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return new.to("cpu")


def allocated_peak(step: Callable[[], Any]) -> int:
    """Most bytes torch allocated at any time of a step, beyond those before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return peak_of(profiler)


def peak_of(profiler: profile) -> int:
    """Most bytes allocated at any time of what a profiler has seen, beyond those before it."""
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@dataclass(frozen=True)
class Step:
    """What one step took, all in bytes.

    Attributes:
        peak: weights, adapter, optimizer state and the most that torch allocated beside them.
        saved: the most that autograd kept for backward, counted through hooks.
        process: by how much the whole process grew beyond what it held before the model, where that is known.
    """

    peak: int
    saved: int = 0
    process: int | None = None


def real_peak(
    architecture: Architecture,
    adapter: AdapterConfig,
    *,
    dtype: torch.dtype,
    quantization: str | None = None,
    double_quant: bool = True,
    **settings: Any,
) -> int:
    """Weights, adapter, optimizer state and the peak of the second step of a real run."""
    model = real_model(architecture, dtype, quantization, double_quant)
    return real_step(model, architecture, adapter, **settings).peak


def real_step(
    model: Any,
    architecture: Architecture,
    adapter: AdapterConfig,
    *,
    batch_size: int,
    max_length: int,
    gradient_checkpointing: bool = False,
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW,
    training: bool = True,
    packing: bool = False,
    resident: int | None = None,
    loss_chunk_size: int = LOSS_CHUNK_SIZE,
    recompute: bool = True,
) -> Step:
    """Adapts a model and measures a step after a first one.

    Args:
        model: the base model.
        architecture: makes the batches.
        adapter: what is trained.
        batch_size: rows.
        max_length: tokens of a row.
        gradient_checkpointing: whether activations are computed again.
        optimizer: makes the optimizer of the adapter's tensors.
        training: a training step, or reading a prompt.
        packing: several rows in a sequence.
        resident: bytes the process held before the model; counts its peak in a step of its own.
        loss_chunk_size: tokens whose logits are in memory at once; 0 for all.
        recompute: whether activations and norms are computed again in backward.
    """
    manager = AdapterManager.attach(model)
    manager.add("one", adapter)
    if not training:
        model.eval()
        inputs = architecture.batch(batch_size, max_length, labels=False) | {"logits_to_keep": 1}

        def prefill() -> Any:
            with torch.no_grad():
                return model(**inputs)

        prefill()
        process = _process_peak(prefill, resident)
        return Step(_standing(model, None) + allocated_peak(prefill), process=process)
    model.train()
    if gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    chosen = optimizer(manager.parameters("one"))
    batch = architecture.batch(batch_size, max_length, labels=True, packed=packing)
    model.config.use_cache = model.config.use_cache and not packing

    def step(inputs: dict[str, Any] = batch) -> None:
        chosen.zero_grad()
        with selective_recompute(model) if recompute else nullcontext():
            chunked_loss(model, loss_chunk_size=loss_chunk_size, **inputs).backward()
        chosen.step()

    step(architecture.batch(1, 8, labels=True))
    process = _process_peak(step, resident)
    chosen.zero_grad()
    allocated = _standing(model, chosen) + allocated_peak(step)
    if resident is None:
        return Step(allocated)
    with SavedTensors(model) as saved:
        step()
    return Step(allocated, saved.peak, process)


def _process_peak(step: Callable[[], Any], resident: int | None) -> int | None:
    """By how much a step raises the memory of the process beyond ``resident``, at most."""
    if resident is None:
        return None
    mark_peak(torch.device("cpu"))
    step()
    found = peak(torch.device("cpu"))
    return None if found is None else found - resident


def _standing(model: nn.Module, optimizer: Any) -> int:
    names = ("base weights", "adapters", "optimizer")
    return sum(part.byte_count for part in measure(model, optimizer).parts if part.name in names)
