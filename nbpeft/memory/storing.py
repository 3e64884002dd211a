"""How the weights of a model are stored, as it or its config says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nbpeft.memory.measure import weights_by_kind
from nbpeft.memory.standin import QUANTIZATIONS

_UNPACKED_ON_LOADING = ("gguf",)
"""Formats that transformers turns into ordinary weights; the config goes on to name them."""


@dataclass(frozen=True)
class Stored:
    """How linear layers are stored.

    Attributes:
        quantization: ``"nf4"``, ``"fp4"``, ``"int8"`` or None.
        double_quant: whether 4-bit constants are quantized too.
        note: what a person should know of it; empty otherwise.
    """

    quantization: str | None = None
    double_quant: bool = True
    note: str = ""


def stored_as(source: Any, config: Any) -> Stored:
    """How a loaded model is stored, or how its config says that the weights are.

    Args:
        source: a model; anything else is passed over.
        config: its transformers config.
    """
    if isinstance(source, nn.Module):
        for kind in weights_by_kind(source):
            label = kind.split(" ")[0]
            if label in QUANTIZATIONS:
                return Stored(label, kind.endswith(" double") or label == "int8")
        return Stored()
    found = getattr(config, "quantization_config", None)
    if found is None:
        return Stored()
    values = found if isinstance(found, Mapping) else found.to_dict()
    method = values.get("quant_method", "another library")
    if getattr(method, "value", method) in _UNPACKED_ON_LOADING:
        return Stored()
    if values.get("load_in_8bit"):
        return Stored("int8")
    if values.get("load_in_4bit"):
        double = bool(values.get("bnb_4bit_use_double_quant", False))
        return Stored(str(values.get("bnb_4bit_quant_type") or "fp4"), double)
    return Stored("nf4", True, f"weights stored by {getattr(method, 'value', method)} are counted as nf4")
