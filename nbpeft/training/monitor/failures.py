"""A one-line explanation of the error that ended a run, with the remedy if it is known.

If it ran out of memory: which part needed most, what to change and how much that saves.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from nbpeft._util.out_of_memory import is_out_of_memory
from nbpeft.engine.tree.model_tree import main_dtype
from nbpeft.errors import NbpeftError, TrainingError
from nbpeft.memory import Forecast, forecast, measure
from nbpeft.memory.checkpointing import is_checkpointing
from nbpeft.memory.devices import device_memory, placed_on
from nbpeft.memory.formatting import size_text
from nbpeft.model.quantization.weight_storage import stored_parts
from nbpeft.names import QUANTIZATIONS
from nbpeft.state import MemoryPart, MemoryState
from nbpeft.training.adapters.adapted_model import active_names, base_of
from nbpeft.training.adapters.learning_check import why_no_gradient
from nbpeft.training.monitor.tracebacks import release_frames

_HALF_REMEDY = (
    "fully trained modules and base biases have the base's dtype; call "
    "nbpeft.cast_mixed_precision_params(model, torch.float16), or use bf16"
)
_OOM_REMEDY = (
    "lower the batch size (and raise gradient_accumulation_steps by as much), shorten the rows (max_length), "
    "switch on activation checkpointing, or lower the rank"
)
_FIXED = ("base weights", "adapters")
_SHOWN_CHANGES = 4
_NAMES = {"batch_size": "per_device_train_batch_size"}
"""Setting of a forecast -> name of the training argument."""
_ESTIMATED = {
    "activations": "activations kept for backward need",
    "temporary": "logits and other temporary tensors need",
    "optimizer": "the optimizer's state needs",
    "gradients": "gradients need",
    "KV cache": "the KV cache needs",
}
_MEASURED = {
    "other": "activations and temporary tensors took",
    "optimizer": "the optimizer's state took",
    "gradients": "gradients took",
}
_OPTIMIZER_STEP = "the optimizer's step"
_SAVES_ACTIVATIONS = ("batch_size", "max_length", "gradient_checkpointing")
"""The settings whose changes do not help in the optimizer's step, when the activations are already freed."""


def explain_failure(error: BaseException, model: nn.Module | None) -> str:
    """Explains an exception that ended a run in one line, with the remedy if it is known.

    Args:
        error: the exception.
        model: the model in training, if it still exists.
    """
    if isinstance(error, NbpeftError):
        return str(error)
    text = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    if is_out_of_memory(error):
        return f"Out of memory: {_OOM_REMEDY}." if model is None else _oom_message(error, model)
    if trains_in_half(error):
        return f"A GradScaler does not support weights trained in float16: {_HALF_REMEDY}."
    if model is not None and "does not require grad" in line:
        why = why_no_gradient(model) or "no trainable parameter took part in the loss"
        return f"No gradient reaches the adapter: {why}."
    return line


def trains_in_half(error: BaseException) -> bool:
    """Whether a GradScaler met gradients in float16, e.g. those of a head copied from a base in float16."""
    return isinstance(error, ValueError) and "unscale FP16 gradients" in str(error)


def oom_error(
    error: Exception,
    model: nn.Module,
    settings: Any,
    batch: tuple[int, int] | None,
    *,
    optimizer: Any,
    step: int,
    costs: Mapping[str, Any] = {},
) -> TrainingError:
    """Explains an out-of-memory error, and releases the memory of the failed step.

    Args:
        error: the exception.
        model: the model in training; its gradients are freed, its weights stay.
        settings: the ``TrainingArguments``.
        batch: rows and tokens per row of the batch that failed, or None.
        optimizer: the optimizer, if there is one.
        step: optimizer steps done.
        costs: how the step was computed, as keywords of ``forecast``: ``loss_chunk_size``, ``recompute`` and
            ``num_adapters``.

    Returns:
        A TrainingError with a one-line message, to raise; its details are ``batch_size``, ``parts`` (bytes),
        ``suggestions``, ``measured`` and ``stage``.
    """
    stage = _stage(error.__traceback__)
    measured = measure(model, optimizer)
    release_frames(error, everything=True)
    error.__traceback__ = error.__context__ = None
    model.zero_grad(set_to_none=True)
    free_memory()
    expected = _expected(model, settings, batch, training=stage != "evaluation", costs=costs)
    size = settings.per_device_eval_batch_size if stage == "evaluation" else settings.per_device_train_batch_size
    where = f"in {stage} after {step} step{'' if step == 1 else 's'}"
    how = f"at batch size {size}" + (f" and {batch[1]} tokens per row" if batch is not None else "")
    parts = expected.parts if expected is not None else measured.parts
    largest = _largest_part(parts, measured, stage, expected is not None)
    return TrainingError(
        f"Out of memory {where}, {how}: {largest}. To change: {_changes(expected, stage, size)}.",
        batch_size=size,
        stage=stage,
        parts={part.name: part.byte_count for part in parts},
        measured=measured,
        suggestions=expected.suggestions if expected is not None else (),
    )


def _oom_message(error: BaseException, model: nn.Module) -> str:
    """The message for a user's own loop, whose batch size is unknown: the largest part measured at the failure.

    Args:
        error: the exception, with its traceback.
        model: the model in training.
    """
    stage = _stage(error.__traceback__)
    measured = measure(model)
    return (
        f"Out of memory in {stage}: {_largest_part(measured.parts, measured, stage, False)}. To change: {_OOM_REMEDY}."
    )


def free_memory() -> None:
    """Collects garbage, and returns cached memory that is no longer used to the device."""
    gc.collect()
    for library in (torch.cuda, torch.xpu, torch.mps):
        if library.is_available():
            library.empty_cache()


def _stage(trace: TracebackType | None) -> str:
    """The stage of the training at which an error was raised, from the functions in its traceback."""
    stage = "forward"
    while trace is not None:
        code = trace.tb_frame.f_code
        place = code.co_filename.replace("\\", "/")
        if code.co_name in ("evaluation_loop", "prediction_step"):
            return "evaluation"
        if "/torch/optim/" in place or "/bitsandbytes/optim/" in place:
            return _OPTIMIZER_STEP
        if "/torch/autograd/" in place or code.co_name == "backward":
            stage = "backward"
        trace = trace.tb_next
    return stage


def _expected(
    model: nn.Module, settings: Any, batch: tuple[int, int] | None, *, training: bool, costs: Mapping[str, Any]
) -> Forecast | None:
    """A forecast of the memory of the whole step; None if it cannot be made."""
    base: Any = base_of(model)
    names = active_names(model)
    configs = getattr(model, "peft_config", {})
    if batch is None or not names or names[0] not in configs:
        return None
    kinds = {kind for part in stored_parts(base) if part.name == "quantized layers" for kind in part.kinds}
    if kinds and not any(item.startswith(QUANTIZATIONS) for item in kinds):
        return None
    optim = str(getattr(settings.optim, "value", settings.optim))
    checkpoints = is_checkpointing(base) or bool(settings.gradient_checkpointing)
    try:
        return forecast(
            base,
            configs[names[0]],
            batch_size=batch[0],
            max_length=batch[1],
            dtype=main_dtype(base),
            gradient_checkpointing=checkpoints,
            optim=optim,
            training=training,
            device=_limit(base),
            **costs,
        )
    except (NbpeftError, RuntimeError, ValueError, TypeError, AttributeError):
        return None  # a model or an optimizer without a forecast: the measurement is used instead


def _limit(base: nn.Module) -> int | None:
    """The accelerator's memory for this process, in bytes; None for the CPU, whose memory is shared."""
    device = placed_on(base) or torch.device("cpu")
    if device.type in ("cpu", "meta"):
        return None
    memory = device_memory(device)
    return None if memory.free is None or memory.used is None else memory.free + memory.used


def _largest_part(parts: tuple[MemoryPart, ...], measured: MemoryState, stage: str, estimated: bool) -> str:
    """``activations need 4.2 GB of 5.6 GB (base weights …)``."""
    sizes = {part.name: part.byte_count for part in parts if part.byte_count}
    grown = {name: size for name, size in sizes.items() if name not in _FIXED}
    if stage == _OPTIMIZER_STEP and sizes.get("optimizer"):
        grown = {"optimizer": sizes["optimizer"]}
    if not grown:
        return f"the model alone takes {size_text(sum(sizes.values()))}"
    name = max(grown, key=lambda part: grown[part])
    size = grown[name]
    others = ", ".join(f"{other} {size_text(sizes[other])}" for other in sizes if other != name)
    words = (_ESTIMATED if estimated else _MEASURED).get(name, f"{name}:")
    device = ""
    if estimated and measured.device_total is not None and not measured.device.startswith("cpu"):
        device = f" on a device of {size_text(measured.device_total)}"
    return f"{words} {size_text(size)} of {size_text(sum(sizes.values()))}{device} (the rest: {others})"


def _changes(expected: Forecast | None, stage: str, size: int) -> str:
    """What to change, and the memory that saves."""
    if stage == "evaluation":
        return (
            f"per_device_eval_batch_size {size} -> {max(size // 2, 1)}, which halves its memory"
            if size > 1
            else ("shorten the rows (max_length)")
        )
    if expected is None or not expected.suggestions:
        return _OOM_REMEDY
    words = []
    helpful = [
        suggestion
        for suggestion in expected.suggestions
        if stage != _OPTIMIZER_STEP or not suggestion.change.startswith(_SAVES_ACTIVATIONS)
    ]
    for suggestion in helpful[:_SHOWN_CHANGES]:
        change = ", ".join(_renamed(part) for part in suggestion.change.split(", "))
        cost = f" ({suggestion.cost})" if suggestion.cost else ""
        fits = ", then it fits" if suggestion.fits else ""
        words.append(f"{change} saves {size_text(suggestion.saved_bytes)}{fits}{cost}")
    return "; ".join(words) or _OOM_REMEDY


def _renamed(change: str) -> str:
    name, _, rest = change.partition(" ")
    return f"{_NAMES.get(name, name)} {rest}".strip()
