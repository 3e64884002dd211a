"""Small functions of ``peft.utils`` and ``peft.tuners.tuners_utils`` that other libraries call."""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.config.targets import ALL_LINEAR, Matcher, condense_targets, matches_segment_names
from nbpeft.engine.contract.adapter import ADAPTER_PARTS, AdapterConfig
from nbpeft.engine.contract.base import onloaded
from nbpeft.engine.contract.registry import method_of, resolve_backend
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.tree.model_tree import bare_modules, base_model_of, embedding_of, manager_of, quantization_method
from nbpeft.engine.tree.tied_weights import modules_tied_to_embedding
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError, ConfigError, HotSwapError, few
from nbpeft.model.handle.functional import set_adapter
from nbpeft.names import IGNORED_LABEL


def infer_device() -> str:
    """The type of device that torch computes on: that of the accelerator, or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """The inputs of a decoder for its labels: one position later, behind a start token.

    Args:
        input_ids: (batch, tokens), int64; -100 stands for what is not learned.
        pad_token_id: takes the place of -100.
        decoder_start_token_id: the first token of each row.

    Returns:
        (batch, tokens), int64.

    Raises:
        ConfigError: there is no ``pad_token_id``.
    """
    if pad_token_id is None:
        raise ConfigError("shift_tokens_right needs pad_token_id, as in the model's config; it is None")
    shifted = torch.roll(input_ids, 1, dims=1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == IGNORED_LABEL, pad_token_id)


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight (out, in) from one that is stored (in, out), if it is; a parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def check_adapters_to_merge(module: Any, adapter_names: list[str] | None = None) -> list[str]:
    """Those of some adapters that are not merged into a layer yet, for the ``merge`` of a layer class of one's own.

    Args:
        module: the layer.
        adapter_names: adapters; the active ones if None.

    Raises:
        ConfigError: they are no list of names.
    """
    names = module.active_adapters if adapter_names is None else adapter_names
    if isinstance(names, str):
        raise ConfigError(f"adapter_names should be a list of strings, got {names!r}.")
    left = [name for name in names if name not in module.merged_adapters]
    if module.merged and not left:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    return left


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Device, address and size in bytes of what a tensor is stored in: equal where two share it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def str_to_bool(value: str) -> int:
    """1 for a yes (y, yes, t, true, on, 1) and 0 for a no (n, no, f, false, off, 0).

    Raises:
        ConfigError: it is neither.
    """
    for words, meaning in (("y yes t true on 1", 1), ("n no f false off 0", 0)):
        if value.lower() in words.split():
            return meaning
    raise ConfigError(f"{value!r:.60} is neither yes nor no; write true or false")


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """The match of a whole module path with a regular expression, or None."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first of some patterns that a module path ends with; the path itself if none.

    Args:
        pattern_keys: names or regular expressions, as the keys of ``rank_pattern``.
        key_to_match: the path.
    """
    return next((key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match)), key_to_match)


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The quantization config of a model that was quantized with a method, such as "gptq"; else None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if quantization_method(model) == method else None


def check_target_module_exists(config: AdapterConfig, key: str) -> bool:
    """Whether a config names the module at a path as a target.

    Args:
        config: with ``target_modules``.
        key: path of the module.
    """
    fields: Any = config
    matcher = Matcher(
        fields.target_modules or (),
        fields.exclude_modules,
        getattr(config, "layers_to_transform", None),
        getattr(config, "layers_pattern", None),
    )
    saved = any(f".{name}." in f".{key}." for name in getattr(config, "modules_to_save", None) or ())
    return not saved and not matcher.excluded(key) and matcher.matches(key)


def inspect_matched_modules(tuner: nn.Module, adapter_name: str = "default") -> dict[str, list[str]]:
    """The paths in a base model that an adapter's config names, and all others.

    Args:
        tuner: ``model.base_model`` of a PeftModel, or the model.
        adapter_name: the adapter's name.

    Returns:
        ``{"matched": [...], "unmatched": [...]}``, in model order.
    """
    manager = require_manager(tuner)
    manager.require(adapter_name)
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for path, _ in bare_modules(manager.model):
        matched = check_target_module_exists(manager.configs[adapter_name], path)
        found["matched" if matched else "unmatched"].append(path)
    return found


def check_hotswap_configs_compatible(config0: AdapterConfig, config1: AdapterConfig) -> None:
    """Checks that adapters of two configs are of one method; the rest is checked where one is swapped in.

    Raises:
        HotSwapError: they are not.
    """
    if config0.peft_type != config1.peft_type:
        types = " and ".join(method_of(config).peft_type for config in (config0, config1))
        raise HotSwapError(f"Incompatible PEFT types found: {types}")


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Loads the tensors of an offloaded layer where it computes, for the time of the block."""
    with onloaded(getattr(layer, "base_layer", layer)):
        yield


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The weight of a layer in a floating dtype, (out, in, ...); the parameter itself where it is not quantized.

    Raises:
        AdapterError: nothing is known of how it is stored.
    """
    backend = resolve_backend(module)
    if backend is None:
        raise AdapterError(f"the weight of a {type(module).__name__} cannot be read: nothing knows how it is stored")
    return module.weight if backend.name == "dense" else backend.dequantize(module)  # type: ignore[return-value]


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers loads models for DeepSpeed ZeRO-3."""
    from transformers.integrations import deepspeed

    return bool(deepspeed.is_deepspeed_zero3_enabled())  # type: ignore[no-untyped-call]


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Which modules FSDP wraps: the blocks of the model, and apart from them every trainable leaf with a weight.

    So trainable and frozen parameters, which FSDP cannot flatten together, are not.

    Args:
        model: the model. Its ``_no_split_modules`` are the blocks, unless the environment variable
            FSDP_TRANSFORMER_CLS_TO_WRAP names them, separated by commas.

    Raises:
        TypeError: no module of the model is of a class that the variable names.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    wanted = _get_no_split_modules(model) if named is None else {name for name in named.split(",") if name}
    classes = {type(module) for module in model.modules() if type(module).__name__ in wanted}
    absent = wanted - {found.__name__ for found in classes}
    if absent and named is not None:
        raise TypeError(f"FSDP_TRANSFORMER_CLS_TO_WRAP: the model has no module of class {', '.join(sorted(absent))}")

    def is_trainable_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not module._modules and isinstance(weight, Tensor) and weight.requires_grad

    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=is_trainable_leaf),
        functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes),
    ]
    return functools.partial(_or_policy, policies=policies)


# PEFT's private names that other libraries import all the same.


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Parent, module and last name of a path."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """Names of the classes whose modules stay on one device: those of the model and of all models in it."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def _maybe_include_all_linear_layers(peft_config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """The config with the paths of all linear layers for "all-linear"; any other as it is."""
    fields: Any = peft_config
    targets = fields.target_modules
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return peft_config
    base = base_model_of(model)
    fields.target_modules = set((manager_of(base) or AdapterManager(base)).plan(peft_config).paths)
    return peft_config


def _find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """The fewest, shortest suffixes that name some modules and none of the others."""
    if isinstance(target_modules, str) or not target_modules:
        raise ConfigError(f"target_modules should be a list or set of strings, not {target_modules!r:.60}")
    if "" in target_modules:
        raise ConfigError("target_modules should not contain an empty string")
    both = set(target_modules) & set(other_module_names)
    if both:
        raise ConfigError(f"target_modules and other_module_names contain common elements: {few(sorted(both))}")
    return condense_targets(target_modules, other_module_names)


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """What the keys of adapters in a model's state dict start with, those of one adapter or of all.

    Rows of ``trainable_token_indices`` are not among them: they count as a module that is trained as a whole.
    """
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    names = {layer: [name for name in layer.adapters if not layer.adapter(name).peft_container] for _, layer in layers}
    carrying = [(path, one) for path, one in layers if names[one] and adapter_name in (None, *names[one])]
    buffers = {layer: {own for one in layer.adapters.values() for own in one._buffers} for _, layer in carrying}
    parts = [
        (path, name)
        for path, layer in carrying
        for name in (*layer.adapter_layer_names, *buffers[layer], ADAPTER_PARTS)
    ]
    return {".".join(filter(None, (*part, adapter_name))) for part in parts}


def _filter_state_dict_by_key_prefixes(state_dict: Mapping[str, Any], prefixes: Collection[str]) -> dict[str, Any]:
    """The entries whose keys are one of the prefixes or go on after it with a dot."""
    starts = tuple(f"{prefix}." for prefix in prefixes)
    return {key: value for key, value in state_dict.items() if f"{key}.".startswith(starts)}


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The rows of a batch, given one of the two."""
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ConfigError("either input_ids or inputs_embeds must be given; both are None")
    return given.shape[0]


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """Path of the input embedding."""
    embedding = embedding_of(model)
    return next((path for path, module in model.named_modules() if module is embedding), default)


def _get_module_names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Paths of the modules that share the weight of the input embedding."""
    return modules_tied_to_embedding(model)


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether a path is a name or ends with it, in whole segments."""
    return matches_segment_names(key, [target_key])


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freezes one adapter."""
    require_manager(model).set_requires_grad(adapter_name, False)


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Activates adapters, their modules trained as a whole included."""
    set_adapter(model, adapter_name, inference_mode)


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """Name of a module in a model; empty where it is not in it."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> Any:
    """Where accelerate put the parts of a model, or the one device of a model that it did not distribute."""
    return getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}


def has_valid_embedding_base_layer(layer: Any) -> bool:
    """Whether a layer is an adapted embedding or linear layer."""
    return isinstance(getattr(layer, "base_layer", None), nn.Linear | nn.Embedding)


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """Name in a model of a layer, or of the frozen layer inside it where that is adapted; None for neither."""
    wanted = [getattr(layer, "base_layer", None), *([] if is_embedding_in_target_modules else [layer])]
    return next((name for name, module in model.named_modules() if any(module is one for one in wanted)), None)


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """``torch.load``, of tensors alone unless it is told otherwise."""
    return torch.load(*args, weights_only=weights_only, **kwargs)
