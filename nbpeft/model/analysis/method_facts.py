"""What each method supports, tested on a small layer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nbpeft.engine.changes.random_numbers import drawing_from
from nbpeft.engine.config.targets import is_all_linear
from nbpeft.engine.contract.adapter import AdapterConfig, ServesRows, TransformsInput, TransformsOutput, swap_refusal
from nbpeft.engine.contract.registry import Method, methods
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import NbpeftError

COMMON = ("LoRA", "DoRA", "AdaLoRA", "(IA)³", "OFT", "VeRA", "LoHa", "LoKr", "prompt tuning", "prefix tuning")
"""Labels of the methods that most people use, in the order in which they are listed."""
_FAMILIES = {
    "lora": "LoRA and its variants",
    "products": "Products of small matrices",
    "projections": "Few parameters in fixed directions",
    "entries": "Selected entries or coefficients",
    "rotations": "Rotations",
    "vectors": "Vectors, biases and norms",
    "prompts": "Learned prompts",
    "shadow": "A network beside the model",
}
"""Folder of a method's config -> the heading of its group."""
GROUPS = ("Most used", *_FAMILIES.values(), "From other packages")
"""Headings of the groups of methods, in display order."""
_TARGET = "target"
"""Path of the layer that sample configs are applied to."""
_FEATURES = 64


@dataclass(frozen=True)
class MethodFacts:
    """What a method supports.

    Attributes:
        merges: whether its adapters can be merged into the weights.
        swaps: whether an adapter can be replaced by another one without recompiling the model.
        quantized: whether it supports quantized layers.
        dequantizes: whether each call on a quantized layer has to dequantize the whole weight.
        serves_rows: whether one forward pass can apply different adapters to different rows of a batch.
    """

    merges: bool
    swaps: bool
    quantized: bool
    dequantizes: bool
    serves_rows: bool


def listed_config(method: Method, fields: Mapping[str, Any]) -> AdapterConfig:
    """Returns the config with which a method is listed: its defaults and those of the given fields that it has.

    A method that is not meant for linear layers keeps its default targets if ``target_modules`` is "all-linear".

    Args:
        method: the method.
        fields: values of config fields; fields that the method does not have are ignored.

    Raises:
        ConfigError: a value is invalid for the method.
    """
    known = method.config_class.__dataclass_fields__
    other_layers = is_all_linear(fields.get("target_modules")) and not method.kinds.linear
    # target_modules would mean layers
    left_out = ("target_modules",) if method.transforms_calls or other_layers else ()
    own = {name: value for name, value in fields.items() if name in known and name not in left_out}
    return method.config_class(**{**method.listing.listed_with, **own})


def facts_of_method(method: Method) -> MethodFacts | None:
    """Returns what a method supports; None for a method that does not adapt layers."""
    sample = dict(next(iter(method.sample_configs.values()), method.listing.listed_with))
    if "target_modules" in method.config_class.__dataclass_fields__:
        sample["target_modules"] = [_TARGET]
    with drawing_from(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager = _tried(method, sample)
    if manager is None:
        return None
    layer, config = manager.layers[_TARGET], manager.configs["default"]
    adapter, shared = layer.adapter("default"), manager.shared("default")
    whole = set(adapter.saved_tensors(dict)) <= set(adapter._parameters)  # not the indices of entries, which differ
    without_weight = isinstance(adapter, TransformsInput | TransformsOutput)
    return MethodFacts(
        merges=not adapter.unmergeable_reason(layer.base),
        swaps=whole
        and not swap_refusal(adapter)
        and not config.initialised_from_weight
        and not (shared and shared.is_saved(config)),
        quantized=method.kinds.quantized,
        dequantizes=adapter.reads_weight and not without_weight,
        serves_rows=isinstance(adapter, ServesRows),
    )


def _tried(method: Method, fields: Mapping[str, Any]) -> AdapterManager | None:
    """Returns a manager with an adapter of the method on a layer of a suitable kind; None if there is none."""
    for layer in (nn.Linear(_FEATURES, _FEATURES), nn.LayerNorm(_FEATURES)):
        manager = AdapterManager(nn.ModuleDict({_TARGET: layer}))
        with contextlib.suppress(NbpeftError):
            manager.add("default", method.config_class(**fields))
            if _TARGET in manager.layers:
                return manager
    return None


def group_of(method: Method) -> str:
    """Returns the heading of the group in which a method is listed, one of ``GROUPS``."""
    if method.label in COMMON:
        return GROUPS[0]
    folders = method.config_class.__module__.split(".")
    return next((title for folder, title in _FAMILIES.items() if folder in folders[:-1]), GROUPS[-1])


def listed_methods() -> tuple[Method, ...]:
    """Returns all methods, grouped by their config class."""
    order = list(dict.fromkeys(method.config_class for method in methods()))
    return tuple(sorted(methods(), key=lambda method: order.index(method.config_class)))
