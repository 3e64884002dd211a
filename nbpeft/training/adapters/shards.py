"""Which tensors of a quantized base FSDP2 can shard, and how they must be stored for it.

FSDP2 shards a parameter along its first dimension and gathers it as a plain parameter without attributes.

    4 bits, linear layers   The codes are sharded: they are stored in a floating-point dtype, because accelerate leaves
                            others whole. Each layer keeps its constants, which are in attributes, whole.
    4 and 8 bits, experts   Whole: FSDP2 would shard the dequantized weights, which are larger.
    8 bits, linear layers   Whole: bitsandbytes reads codes and constants from attributes of the parameter.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from nbpeft.engine.backends.bnb4bit import store_codes_as
from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.kernels.storage import is_packed
from nbpeft.engine.tree.model_tree import is_quantized, is_quantized_layer
from nbpeft.memory.formatting import size_text

_UNIT = 4
"""Bytes of the largest dtype that codes are stored in; their number must be a multiple of it."""


def make_shardable(model: nn.Module, plugin: Any) -> None:
    """Stores 4-bit codes in a dtype that FSDP2 shards, and excludes from sharding what it cannot shard.

    No bit of the codes changes.

    Args:
        model: the base model, not sharded yet.
        plugin: accelerate's settings of FSDP2. With mixed precision its policy casts floating-point parameters to
            another dtype, which would destroy codes in any but this dtype.
    """
    whole = _kept_whole(model)
    if whole:
        plugin.ignored_modules = [*_modules_ignored(model, plugin), nn.ParameterList(whole)]
    dtype = getattr(plugin.mixed_precision_policy, "param_dtype", None) or torch.bfloat16
    excluded = {id(parameter) for parameter in whole}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if is_packed(weight) and id(weight) not in excluded:
            store_codes_as(module, dtype)


def can_start_on_the_cpu(model: nn.Module) -> bool:
    """Returns whether FSDP2 can move and shard all tensors of a model that is on the CPU, layer by layer."""
    if not is_quantized(model):
        return True
    layers = [module for module in model.modules() if is_quantized_layer(module)]
    return all(is_packed(layer._parameters.get("weight")) for layer in layers) and not _kept_whole(model)


def note_on_whole(model: nn.Module) -> str:
    """Returns a note about weights that are not sharded; empty if there are none."""
    byte_count = sum(parameter.nbytes for parameter in _kept_whole(model))
    if not byte_count:
        return ""
    return f"{size_text(byte_count)} of quantized weights cannot be sharded: each process has them whole"


def _kept_whole(model: nn.Module) -> list[nn.Parameter]:
    """The quantized parameters that FSDP2 cannot shard."""
    return [parameter for parameter in model.parameters() if not _can_shard(parameter)]


def _can_shard(parameter: nn.Parameter) -> bool:
    if is_packed(parameter):
        return parameter.nbytes % _UNIT == 0 == parameter.storage_offset() * parameter.element_size() % _UNIT
    return not isinstance(parameter, QuantizedMatrices) and type(parameter).__name__ != "Int8Params"


def _modules_ignored(model: nn.Module, plugin: Any) -> list[nn.Module]:
    """The modules that a user's settings exclude; accelerate takes a list, or a pattern of paths."""
    given = plugin.ignored_modules
    if isinstance(given, str):
        return [module for path, module in model.named_modules() if re.fullmatch(given, path)]
    return list(given or ())
