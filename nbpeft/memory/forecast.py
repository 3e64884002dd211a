"""Will it fit? What a training run or a generation will need, before it runs."""

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
from nbpeft.display.blocks import Block, Card, Table
from nbpeft.display.shown import Shown
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.tree.model_tree import base_model_of, experts_to_quantize
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.losses import check_chunk_size
from nbpeft.memory.architecture import Architecture, architecture_of
from nbpeft.memory.devices import device_memory, is_cpu, placed_on
from nbpeft.memory.estimate import Setting, estimate
from nbpeft.memory.formatting import size_text
from nbpeft.memory.measure import weights_by_kind
from nbpeft.memory.optimizers import kind_of
from nbpeft.memory.suggest import Suggestion, suggest
from nbpeft.names import LOSS_CHUNK_SIZE, QUANTIZATIONS
from nbpeft.state import MemoryPart

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


_UNPACKED_ON_LOADING = ("gguf",)
"""Formats that transformers turns into ordinary weights; the config goes on to name them."""


@dataclass(frozen=True)
class Forecast(Shown):
    """What a step will need at its peak.

    Attributes:
        parts: the peak, part by part; they add up to ``peak_bytes``.
        device_bytes: what the device has, or None.
    """

    parts: tuple[MemoryPart, ...]
    device_bytes: int | None
    setting: Setting = field(repr=False)

    @property
    def peak_bytes(self) -> int:
        """Most bytes needed at any time of a step."""
        return sum(part.byte_count for part in self.parts)

    @property
    def fits(self) -> bool | None:
        """Whether the device has that much; None if no device was given."""
        return None if self.device_bytes is None else self.peak_bytes <= self.device_bytes

    @cached_property
    def suggestions(self) -> tuple[Suggestion, ...]:
        """Changes that lower the peak; those that make it fit first, then those that save most."""
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


def forecast(
    model_or_config: Any,
    adapter_config: AdapterConfig | None = None,
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    double_quant: bool = True,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    training: bool = True,
    packing: bool = False,
    adapters: int = 1,
    device: int | str | torch.device | None = None,
    loss_chunk_size: int = LOSS_CHUNK_SIZE,
    recompute: bool = True,
    processes: int = 1,
    sharded: bool = False,
) -> Forecast:
    """Estimate what a run will need, from shapes alone; no weight is loaded.

    The step is run on fake tensors with three layers of the model, which gives what every
    further layer adds; weights, adapters and optimizer state are exact. Scratch space inside
    single kernels, a CUDA context (0.3-0.6 GB) and fragmentation come on top. So do, in host memory, the copy of what
    trains that ``nbpeft.train`` keeps with ``stop_on_divergence``, and the random states of PVeRA with a
    ``generator_seed`` (5 KB for each of a layer's last 256 calls).

    Args:
        model_or_config: a transformers model, its config, a folder, or a hub id.
        adapter_config: the adapter to train or to run with; None for the model alone (all of it
            trains then).
        batch_size: sequences in a step.
        sequence_length: tokens of each, padding included, so those of the longest row; with ``packing`` those of all
            rows in a sequence; in inference prompt and answer together.
        dtype: of weights and activations; by default the model's.
        quantization: how linear layers are stored: ``"nf4"``, ``"fp4"`` or ``"int8"``. None: as they are
            in the model, or as its config says.
        double_quant: whether 4-bit constants are quantized too.
        gradient_checkpointing: keep layer inputs only, compute the rest again in backward.
        optimizer: ``"adamw"``, ``"adamw_8bit"``, ``"sgd"``, … or a name of ``TrainingArguments.optim``.
        training: forward, backward and optimizer; else reading a prompt into a cache.
        packing: whether each sequence holds several rows, for which some kinds of attention need a mask.
        adapters: how many are trained side by side, each with a batch of that size.
        device: what it should fit: bytes, ``"16GB"``, a name (``"T4"``), or a device of this machine. Where it
            is, or the model is on, a CPU, what CPU kernels copy is counted.
        loss_chunk_size: tokens whose logits are in memory at once, as ``nbpeft.Trainer`` and
            ``nbpeft.chunked_loss`` have it; 0 for logits as a whole. All tokens are taken as learned.
        recompute: compute activations and norms again in backward, as ``nbpeft.train`` does by default.
        processes: that train together, each with its own batch and device; what one of them needs is estimated.
        sharded: whether they share the model out (FSDP2); else each has all of it (DDP).

    Raises:
        ConfigError: a value is impossible or the model cannot run without data.
        TargetError: the adapter does not fit the model.
    """
    architecture = architecture_of(model_or_config, adapter_config)
    stored = stored_as(model_or_config, architecture.config)
    if quantization is None:
        quantization, double_quant = stored.quantization, stored.double_quant if stored.quantization else double_quant
    setting = setting_of(
        architecture,
        adapter_config,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=dtype,
        quantization=quantization,
        double_quant=double_quant,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        training=training,
        packing=packing,
        adapters=adapters,
        on_cpu=is_cpu(placed_on(model_or_config) if device is None else device),
        loss_chunk_size=loss_chunk_size,
        recompute=recompute,
        processes=processes,
        sharded=sharded,
        quantized_experts=stored.experts or quantization != stored.quantization,
    )
    return Forecast(estimate(setting), device_bytes(device), setting)


def setting_of(
    architecture: Architecture,
    adapter_config: AdapterConfig | None,
    *,
    batch_size: int,
    sequence_length: int,
    dtype: torch.dtype | str | None,
    quantization: str | None,
    gradient_checkpointing: bool,
    optimizer: str,
    training: bool,
    adapters: int = 1,
    double_quant: bool = True,
    on_cpu: bool = False,
    loss_chunk_size: int = LOSS_CHUNK_SIZE,
    recompute: bool = True,
    packing: bool = False,
    processes: int = 1,
    sharded: bool = False,
    quantized_experts: bool = True,
) -> Setting:
    """Check the values of a forecast and put them together; see ``forecast`` and ``Setting``.

    Raises:
        ConfigError: a value is impossible.
    """
    sizes = {"batch_size": batch_size, "sequence_length": sequence_length}
    sizes |= {"adapters": adapters, "processes": processes}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")
    switches = {"gradient_checkpointing": gradient_checkpointing, "training": training, "double_quant": double_quant}
    switches |= {"recompute": recompute, "packing": packing, "sharded": sharded}
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise ConfigError(f"{name} is {switch!r}; expected True or False")
    kind_of(optimizer)
    return Setting(
        architecture=architecture,
        adapter_config=adapter_config,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=_dtype(dtype, architecture.config),
        quantization=_check_quantization(quantization),
        double_quant=double_quant,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        training=training,
        adapters=adapters,
        on_cpu=on_cpu,
        loss_chunk_size=check_chunk_size(loss_chunk_size),
        recompute=recompute,
        packing=packing,
        processes=processes,
        sharded=sharded,
        quantized_experts=quantized_experts,
    )


def _check_quantization(kind: str | None) -> str | None:
    if kind is not None and kind not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization {kind!r} is not one of {', '.join(QUANTIZATIONS)} or None."
            + did_you_mean(str(kind), QUANTIZATIONS),
            quantization=kind,
        )
    return kind


def _dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype:
    if dtype is None:
        dtype = getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ConfigError(f"dtype {dtype!r} is not a floating dtype such as 'bfloat16'", dtype=dtype)
    return found


def device_bytes(device: int | str | torch.device | None) -> int | None:
    """Bytes of a device given as a number, a size such as ``16GB``, a name such as ``T4``, or a device of this machine.

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
            f"device {device!r} is neither a size such as '16GB' nor a device here, nor the name of one, such as 'T4'."
            + (nearest(device) if isinstance(device, str) else "")
        )
    return size


@dataclass(frozen=True)
class Stored:
    """How linear layers are stored.

    Attributes:
        quantization: ``"nf4"``, ``"fp4"``, ``"int8"`` or None.
        double_quant: whether 4-bit constants are quantized too.
        note: what a person should know of it; empty otherwise.
        experts: whether the experts of a mixture are stored like that, too.
    """

    quantization: str | None = None
    double_quant: bool = True
    note: str = ""
    experts: bool = True


def stored_as(source: Any, config: Any) -> Stored:
    """Return how a loaded model is stored, or how its config says that the weights are.

    Args:
        source: a model; anything else is ignored.
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
