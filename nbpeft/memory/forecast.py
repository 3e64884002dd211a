"""Forecasts the memory of a training run or of inference before it runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from nbpeft._util.device_names import DEVICES, named, nearest
from nbpeft._util.former_names import refusing_former_names
from nbpeft.display.blocks import Block, Card, Table
from nbpeft.display.shown import Shown
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.tree.model_tree import base_model_of, experts_to_quantize
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.losses import check_chunk_size
from nbpeft.memory.architecture import Architecture, architecture_of
from nbpeft.memory.checkpointing import is_checkpointing
from nbpeft.memory.devices import device_memory, has_bfloat16, is_cpu, placed_on
from nbpeft.memory.estimate import Setting, estimate
from nbpeft.memory.formatting import size_text
from nbpeft.memory.measure import weights_by_kind
from nbpeft.memory.optimizers import kind_of
from nbpeft.memory.suggest import Suggestion, suggest
from nbpeft.names import BATCH_SIZE, LOSS_CHUNK_SIZE, MAX_LENGTH, QUANTIZATIONS
from nbpeft.state import MemoryPart

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_UNPACKED_ON_LOADING = ("gguf",)
"""Formats that transformers converts to ordinary weights on loading, although the config still names them."""


@dataclass(frozen=True)
class Forecast(Shown):
    """The memory that a step will need at its peak.

    Attributes:
        parts: the parts of the peak; they add up to ``peak_bytes``.
        device_bytes: memory of the device in bytes, or None.
        setting: the setting of the forecast.
    """

    parts: tuple[MemoryPart, ...]
    device_bytes: int | None
    setting: Setting = field(repr=False)

    @property
    def peak_bytes(self) -> int:
        """Peak memory of a step in bytes."""
        return sum(part.byte_count for part in self.parts)

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits the device; None if no device was given."""
        return None if self.device_bytes is None else self.peak_bytes <= self.device_bytes

    @cached_property
    def suggestions(self) -> tuple[Suggestion, ...]:
        """Changes that lower the peak: first those that make it fit, then by bytes saved."""
        return suggest(self.setting, self.device_bytes)

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name} {size_text(part.byte_count)}" for part in self.parts if part.byte_count)
        verdict = ""
        if self.device_bytes is not None:
            verdict = f"; {'fits' if self.fits else 'does not fit'} {size_text(self.device_bytes)}"
        return f"peak {size_text(self.peak_bytes)} ({parts}){verdict}"

    def view(self) -> Block:
        """Return the parts as a table."""
        rows = tuple((part.name, size_text(part.byte_count), part.detail) for part in self.parts)
        return Card(str(self), (Table(("Part", "Size", ""), rows, right=(1,)),))


@refusing_former_names
def forecast(
    model_or_config: Any,
    adapter_config: AdapterConfig | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    double_quant: bool = True,
    gradient_checkpointing: bool | None = None,
    optim: str = "adamw",
    training: bool = True,
    packing: bool = False,
    num_adapters: int = 1,
    device: int | str | torch.device | None = None,
    loss_chunk_size: int = LOSS_CHUNK_SIZE,
    recompute: bool = True,
    processes: int = 1,
    fsdp: bool = False,
    reference: str | None = None,
    generation: bool = False,
) -> Forecast:
    """Estimate the peak memory of a training or inference step from shapes alone; no weights are loaded.

    Batch, length and checkpointing are by default the training's.

    Three layers of the model are run on fake tensors, and further layers are extrapolated; weights, adapters and
    optimizer state are exact. Scratch space inside single kernels, the CUDA context (0.3-0.6 GB) and fragmentation are
    not included. Neither are, in host memory, the copy of the trained weights that ``nbpeft.train`` makes with
    ``stop_on_divergence``, and the random states of PVeRA with a ``generator_seed`` (5 KB for each of a layer's last
    256 calls).

    Args:
        model_or_config: a transformers model, its config, a folder, or a hub id.
        adapter_config: config of the adapter; None for the model alone, all of whose parameters are then trained.
        batch_size: sequences per step, 8 by default. A row with a chosen and a rejected completion has two, and
            computing the reference of ``dpo`` needs no more memory than its training step.
        max_length: tokens per sequence, including padding, i.e. the length of the longest row; with ``packing``
            the tokens of all rows in a sequence; in inference the tokens of prompt and answer. By default the length
            to which a training cuts rows: 1024, or the model's positions if it has fewer.
        dtype: dtype of weights and activations; by default the model's.
        quantization: format of linear layers: ``"nf4"``, ``"fp4"`` or ``"int8"``; None for that of the model or its
            config.
        double_quant: whether 4-bit constants are quantized too.
        gradient_checkpointing: save only the inputs of layers and recompute the rest in backward. By default as the
            model is set; on if quantized weights would be loaded, because preparing it for training switches it on.
        optim: ``"adamw"``, ``"adamw_8bit"``, ``"sgd"``, … or a value of ``TrainingArguments.optim``.
        training: whether to forecast forward, backward and optimizer step; False for the prefill of a KV cache.
        packing: whether each sequence contains several rows, for which some attention implementations need a mask.
        num_adapters: number of adapters that are trained side by side, each with its own batch of ``batch_size``.
        device: the device it should fit: a number of bytes, ``"16GB"``, a name (``"T4"``), or a device of this machine.
            If it is a CPU, or by default if the model is on a CPU, the copies that CPU kernels make are included.
        loss_chunk_size: tokens whose logits are in memory at once, as in ``nbpeft.Trainer`` and
            ``nbpeft.chunked_loss``; 0 for all. All tokens are assumed to have labels.
        recompute: recompute activation functions and norms in backward, as ``nbpeft.train`` does by default.
        processes: number of processes that train together, each with its own batch and device; the result is the
            memory of one of them.
        fsdp: whether the processes shard the model (FSDP2) instead of each having a copy (DDP).
        reference: ``"start"`` if the loss compares the trained weights with a copy of those at the beginning, as
            ``dpo`` does for an adapter that is trained already; any other reference needs no memory.
        generation: whether as many completions are generated before each step, as by ``grpo``; ``max_length`` is
            then that of prompt and completion.

    Returns:
        The forecast, with its parts and suggestions to lower the peak.

    Raises:
        ConfigError: a value is invalid or the model cannot run on fake tensors.
        TargetError: the adapter does not fit the model.
    """
    architecture = architecture_of(model_or_config, adapter_config)
    stored = stored_as(model_or_config, architecture.config)
    if quantization is None:
        quantization, double_quant = stored.quantization, stored.double_quant if stored.quantization else double_quant
    if gradient_checkpointing is None:
        gradient_checkpointing = default_checkpointing(model_or_config, architecture, quantization, stored)
    setting = setting_of(
        architecture,
        adapter_config,
        batch_size=batch_size,
        max_length=default_length(architecture.config) if max_length is None else max_length,
        dtype=dtype,
        quantization=quantization,
        double_quant=double_quant,
        gradient_checkpointing=gradient_checkpointing,
        optim=optim,
        training=training,
        packing=packing,
        num_adapters=num_adapters,
        on_cpu=is_cpu(there := placed_on(model_or_config) if device is None else device),
        bfloat16=has_bfloat16(there),
        loss_chunk_size=loss_chunk_size,
        recompute=recompute,
        processes=processes,
        fsdp=fsdp,
        reference=reference,
        generation=generation,
        quantized_experts=stored.experts or quantization != stored.quantization,
    )
    return Forecast(estimate(setting), device_bytes(device), setting)


def setting_of(
    architecture: Architecture,
    adapter_config: AdapterConfig | None,
    *,
    dtype: torch.dtype | str | None,
    quantization: str | None,
    **fields: Any,
) -> Setting:
    """Check the arguments of a forecast, which are the fields of a ``Setting``, and combine them in one.

    Raises:
        ConfigError: a value is invalid.
    """
    setting = Setting(
        architecture, adapter_config, dtype=_dtype(dtype, architecture.config), quantization=quantization, **fields
    )
    for name in ("batch_size", "max_length", "num_adapters", "processes"):
        if type(value := getattr(setting, name)) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")
    for name in ("gradient_checkpointing", "training", "double_quant", "recompute", "packing", "fsdp", "generation"):
        if not isinstance(value := getattr(setting, name), bool):
            raise ConfigError(f"{name} is {value!r}; expected True or False")
    kind_of(setting.optim)
    if quantization is not None and quantization not in QUANTIZATIONS:
        near = did_you_mean(str(quantization), QUANTIZATIONS)
        raise ConfigError(f"quantization {quantization!r} is not one of {', '.join(QUANTIZATIONS)} or None.{near}")
    if not isinstance(setting.reference, str | None):
        raise ConfigError(f"reference is {setting.reference!r:.60}; expected 'base', 'start' or the name of an adapter")
    check_chunk_size(setting.loss_chunk_size)
    return setting


def default_length(config: Any) -> int:
    """Return the default of ``max_length`` for a model with this config: that of a training, or its positions."""
    return min(MAX_LENGTH, int(getattr(config, "max_position_embeddings", None) or MAX_LENGTH))


def default_checkpointing(source: Any, architecture: Architecture, quantization: str | None, stored: Stored) -> bool:
    """Return whether a training recomputes activations by default; see ``forecast``.

    Args:
        source: a model, or what a forecast takes instead of one.
        architecture: its architecture.
        quantization: format of the linear layers in training.
        stored: format of those of the model or config.
    """
    to_load = not isinstance(source, nn.Module) or quantization != stored.quantization
    return is_checkpointing(source) or (quantization is not None and to_load and architecture.checkpoints)


def _dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype:
    if dtype is None:
        dtype = getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ConfigError(f"dtype {dtype!r} is not a floating-point dtype such as 'bfloat16'", dtype=dtype)
    return found


def device_bytes(device: int | str | torch.device | None) -> int | None:
    """Return the memory of a device in bytes.

    Args:
        device: a number of bytes, a size such as ``16GB``, a name such as ``T4``, a device of this machine, or None.

    Raises:
        ConfigError: it is none of these.
    """
    if device is None:
        return None
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmg]?i?b?)\s*", str(device), re.IGNORECASE)
    size = 0
    if match is not None:
        unit = match[2].upper()
        size = int(float(match[1]) * _UNITS[unit if unit in _UNITS else f"{unit}B"])
    elif isinstance(device, str) and (name := named(device)) is not None:
        return DEVICES[name]
    elif isinstance(device, str | torch.device):
        with contextlib.suppress(RuntimeError, AssertionError):
            return device_memory(torch.device(device)).total
    if size < 1:
        raise ConfigError(
            f"device {device!r} is not a size such as '16GB', a device of this machine, or a known GPU such as 'T4'."
            + (nearest(device) if isinstance(device, str) else "")
        )
    return size


@dataclass(frozen=True)
class Stored:
    """The storage format of linear layers.

    Attributes:
        quantization: ``"nf4"``, ``"fp4"``, ``"int8"`` or None.
        double_quant: whether 4-bit constants are quantized too.
        note: a note for the user, or the empty string.
        experts: whether the experts of a mixture-of-experts model have that format too.
    """

    quantization: str | None = None
    double_quant: bool = True
    note: str = ""
    experts: bool = True


def stored_as(source: Any, config: Any) -> Stored:
    """Return the storage format of a loaded model's linear layers, or the format that a config declares.

    Args:
        source: the model; for anything else only the config is used.
        config: its transformers config.
    """
    if isinstance(source, nn.Module):
        for kind in weights_by_kind(source):
            label = kind.split(" ")[0]
            if label in QUANTIZATIONS:
                experts = not experts_to_quantize(base_model_of(source))
                return Stored(label, kind.endswith(" double") or label == "int8", experts=experts)
        return Stored()
    found = getattr(config, "quantization_config", None)
    if found is None:
        return Stored()
    values = found if isinstance(found, Mapping) else found.to_dict()
    method = values.get("quant_method", "another library")
    method = getattr(method, "value", method)
    if method in _UNPACKED_ON_LOADING:
        return Stored()
    if values.get("load_in_8bit"):
        return Stored("int8")
    if values.get("load_in_4bit"):
        double = bool(values.get("bnb_4bit_use_double_quant", False))
        return Stored(str(values.get("bnb_4bit_quant_type") or "fp4"), double)
    return Stored("nf4", True, f"weights stored by {method} are counted as nf4")
