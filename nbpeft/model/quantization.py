"""How a base model is to be quantized: settings, and what suits the device."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.memory.processor import has_instructions
from nbpeft.names import DTYPES, QUANT_TYPES, SHORT_DTYPES

_STORAGES = ("uint8", *DTYPES)
_ALIASES = {**SHORT_DTYPES, "half": "float16", "float": "float32"}


def quantization(
    *,
    bits: int = 4,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | str | None = None,
    quant_storage: torch.dtype | str | None = None,
    skip_modules: Sequence[str] | None = None,
) -> Any:
    """The settings as a ``transformers.BitsAndBytesConfig``.

    Args:
        bits: 4 or 8.
        quant_type: ``"nf4"`` or ``"fp4"``; for 4 bits.
        double_quant: whether the constants of 4-bit blocks are quantized too (0.4 bits less a weight).
        compute_dtype: what 4-bit layers compute in; by default bfloat16 where the device is good
            at it, else float16 on an accelerator and float32 on a CPU.
        quant_storage: dtype that holds the 4-bit codes; FSDP wants it equal to the other weights'.
        skip_modules: names of layers that stay as they are, beside the head.

    Raises:
        ConfigError: a value is impossible.
    """
    transformers = importlib.import_module("transformers")
    if bits not in (4, 8) or isinstance(bits, bool):
        raise ConfigError(f"bits is {bits!r}; expected 4 or 8", field="bits")
    if not isinstance(double_quant, bool):
        raise ConfigError(f"double_quant is {double_quant!r}; expected True or False", field="double_quant")
    if quant_type not in QUANT_TYPES:
        near = did_you_mean(str(quant_type), QUANT_TYPES)
        raise ConfigError(f"quant_type is {quant_type!r}; expected 'nf4' or 'fp4'.{near}", field="quant_type")
    skipped = None if skip_modules is None else list(skip_modules)
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    storage = torch.uint8 if quant_storage is None else dtype_of(quant_storage, "quant_storage", _STORAGES)
    computes = usual_dtype() if compute_dtype is None else dtype_of(compute_dtype, "compute_dtype", DTYPES)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=computes,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=skipped,
    )


def usual_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def usual_dtype() -> torch.dtype:
    """bfloat16 where the device computes in it natively, else float16, on other CPUs float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    if torch.accelerator.is_available():
        return torch.bfloat16
    return torch.bfloat16 if has_instructions(torch.bfloat16) else torch.float32


def dtype_of(value: torch.dtype | str, field: str, allowed: Sequence[str]) -> torch.dtype:
    """A dtype from itself or its name.

    Raises:
        ConfigError: it is none of ``allowed``.
    """
    name = str(value).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in allowed:
        near = did_you_mean(name, allowed)
        raise ConfigError(f"{field} is {value!r}; expected one of {', '.join(allowed)}.{near}", field=field)
    found: torch.dtype = getattr(torch, name)
    return found
