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
from nbpeft.engine.contract.shared_state import state_of_all
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.tree.model_tree import bare_modules, base_model_of, embedding_of, manager_of, quantization_method
from nbpeft.engine.tree.tied_weights import modules_tied_to_embedding
from nbpeft.engine.views.own_modules import OwnBuffers, OwnModules
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError, ConfigError, HotSwapError, NotSupportedError, few
from nbpeft.model.handle.functional import set_adapter
from nbpeft.model.handle.tuner import BaseTuner
from nbpeft.names import IGNORED_LABEL


def infer_device() -> str:
    """Returns the type of torch's current accelerator, e.g. "cuda", or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def _maybe_shard_state_dict_for_tp(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """Leaves the tensors of an adapter as they are; transformers 5.15 calls it for each adapter that it loads.

    Args:
        model: the model.
        state_dict: the tensors of the adapter.
        adapter_name: its name.

    Raises:
        NotSupportedError: a layer with adapters is tensor parallel, so that its adapters would have to be sharded.
    """
    for name, module in model.named_modules():
        base = module.base_layer if isinstance(module, AdaptedLayer) else None
        if getattr(base, "_hf_tp_plan", None) is not None and getattr(base, "_hf_device_mesh", None) is not None:
            message = f"{name} is tensor parallel: adapter {adapter_name!r} cannot be loaded into sharded layers"
            raise NotSupportedError(message, name=adapter_name, layer=name)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Returns the inputs of a decoder for its labels: shifted right by one position, after a start token.

    Args:
        input_ids: (batch, tokens), int64; -100 for labels that the loss ignores.
        pad_token_id: replaces -100.
        decoder_start_token_id: first token of each row.

    Returns:
        (batch, tokens), int64.

    Raises:
        ConfigError: ``pad_token_id`` is None.
    """
    if pad_token_id is None:
        raise ConfigError("shift_tokens_right needs pad_token_id, as in the model's config; it is None")
    shifted = torch.roll(input_ids, 1, dims=1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == IGNORED_LABEL, pad_token_id)


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Returns a weight (out, in) from one that may be stored as (in, out); a parameter remains a parameter."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def check_adapters_to_merge(module: Any, adapter_names: list[str] | None = None) -> list[str]:
    """Returns the adapters that are not merged into a layer yet, for the ``merge`` of a custom layer class.

    Args:
        module: the layer.
        adapter_names: names of adapters; None for the active ones.

    Raises:
        ConfigError: ``adapter_names`` is a string.
    """
    names = module.active_adapters if adapter_names is None else adapter_names
    if isinstance(names, str):
        raise ConfigError(f"adapter_names should be a list of strings, got {names!r}.")
    left = [name for name in names if name not in module.merged_adapters]
    if module.merged and not left:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    return left


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Returns device, address and size in bytes of a tensor's storage, which are equal for shared storage."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def str_to_bool(value: str) -> int:
    """Returns 1 for "y", "yes", "t", "true", "on" and "1", and 0 for "n", "no", "f", "false", "off" and "0".

    Raises:
        ConfigError: the value is none of these.
    """
    for words, meaning in (("y yes t true on 1", 1), ("n no f false off 0", 0)):
        if value.lower() in words.split():
            return meaning
    raise ConfigError(f"{value!r:.60} is neither yes nor no; write true or false")


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """Returns the match of a regular expression with a whole module path, or None."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """Returns the first pattern that matches the end of a module path; the path itself if there is none.

    Args:
        pattern_keys: names or regular expressions, as the keys of ``rank_pattern``.
        key_to_match: the path.
    """
    return next((key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match)), key_to_match)


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """Returns the quantization config of a model quantized with a method, such as "gptq"; None for others."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if quantization_method(model) == method else None


def check_target_module_exists(config: AdapterConfig, key: str) -> bool:
    """Returns whether a config targets the module at a path.

    Args:
        config: a config with ``target_modules``.
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
    """Returns the paths in a base model that an adapter's config targets, and all others.

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
    """Checks that two configs are of the same method; other requirements are checked when hot-swapping.

    Raises:
        HotSwapError: the methods differ.
    """
    if config0.peft_type != config1.peft_type:
        types = " and ".join(method_of(config).peft_type for config in (config0, config1))
        raise HotSwapError(f"Incompatible PEFT types found: {types}")


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Context manager: loads the tensors of an offloaded layer to its compute device."""
    with onloaded(getattr(layer, "base_layer", layer)):
        yield


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """Returns the weight of a layer, (out, in, ...), dequantized if it is quantized; else the parameter itself.

    Raises:
        AdapterError: the storage format of the layer is unknown.
    """
    backend = resolve_backend(module)
    if backend is None:
        raise AdapterError(f"the weight of a {type(module).__name__} cannot be read: its storage format is unknown")
    return module.weight if backend.name == "dense" else backend.dequantize(module)  # type: ignore[return-value]


def check_deepspeed_zero3_enabled() -> bool:
    """Returns whether transformers loads models for DeepSpeed ZeRO-3."""
    from transformers.integrations import deepspeed

    return bool(deepspeed.is_deepspeed_zero3_enabled())


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Returns a policy for FSDP that wraps the blocks of the model, and separately every trainable leaf with a weight.

    FSDP cannot flatten trainable and frozen parameters together, so they must be in different units.

    Args:
        model: the model. Its ``_no_split_modules`` are the blocks, unless the environment variable
            FSDP_TRANSFORMER_CLS_TO_WRAP names them, separated by commas.

    Raises:
        TypeError: the variable names a class, and the model has no module of this class.
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


# PEFT's private names that other libraries import.


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Returns the parent, the module and the last component of a path."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """Returns the names of the classes whose modules must stay on one device, for the model and all models in it."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def _maybe_include_all_linear_layers(peft_config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """Replaces "all-linear" in a config by the paths of all linear layers; other configs are not changed."""
    fields: Any = peft_config
    targets = fields.target_modules
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return peft_config
    base = base_model_of(model)
    fields.target_modules = set((manager_of(base) or AdapterManager(base)).plan(peft_config).paths)
    return peft_config


def _find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """Returns a minimal set of suffixes that match all target modules and none of the other modules."""
    if isinstance(target_modules, str) or not target_modules:
        raise ConfigError(f"target_modules should be a list or set of strings, not {target_modules!r:.60}")
    if "" in target_modules:
        raise ConfigError("target_modules should not contain an empty string")
    both = set(target_modules) & set(other_module_names)
    if both:
        raise ConfigError(f"target_modules and other_module_names contain common elements: {few(sorted(both))}")
    return condense_targets(target_modules, other_module_names)


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Returns prefixes of the keys in a model's state dict, for one adapter or for all.

    Rows of ``trainable_token_indices`` are not among them: they count as a module that is trained as a whole.
    """
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    names = {layer: [name for name in layer.adapters if not layer.adapter(name).peft.container] for _, layer in layers}
    selected = [(path, layer) for path, layer in layers if names[layer] and adapter_name in (None, *names[layer])]
    adapters = {layer: [*layer.adapters.values()] for _, layer in selected}
    states = {
        layer: [state for one in own if (state := state_of_all(one)) is not None] for layer, own in adapters.items()
    }
    buffers = {layer: {name for one in own for name in one._buffers} for layer, own in adapters.items()}
    shared = {
        layer: {key.partition(".")[0] for state in states[layer] for key in state.state_dict()} for layer in adapters
    }
    parts = [
        (path, name)
        for path, layer in selected
        for name in (*layer.adapter_layer_names, *buffers[layer], *shared[layer], ADAPTER_PARTS)
    ]
    tuners = [path for path, module in model.named_modules() if isinstance(module, BaseTuner)]
    parts += [(path, name) for path in tuners for name in set().union(*shared.values())]
    for path, module in model.named_modules():
        if isinstance(module, OwnModules):
            parts.append((path, ""))
        elif isinstance(module, OwnBuffers):
            parts += [(path, key) for key in module]
    return {".".join(filter(None, (*part, adapter_name or ""))) for part in parts}


def _filter_state_dict_by_key_prefixes(state_dict: Mapping[str, Any], prefixes: Collection[str]) -> dict[str, Any]:
    """Returns the entries whose keys are equal to a prefix or continue it after a dot."""
    starts = tuple(f"{prefix}." for prefix in prefixes)
    return {key: value for key, value in state_dict.items() if f"{key}.".startswith(starts)}


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Returns the number of rows of a batch, from ``input_ids`` or else from ``inputs_embeds``."""
    inputs = inputs_embeds if input_ids is None else input_ids
    if inputs is None:
        raise ConfigError("either input_ids or inputs_embeds must be given; both are None")
    return inputs.shape[0]


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """Returns the path of the input embedding."""
    embedding = embedding_of(model)
    return next((path for path, module in model.named_modules() if module is embedding), default)


def _get_module_names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Returns the paths of the modules that share the input embedding's weight."""
    return modules_tied_to_embedding(model)


def _set_layer_requires_grad(layer: nn.Module | Tensor, requires_grad: bool) -> None:
    """Sets ``requires_grad`` of a tensor or of a module's parameters, except those that are computed."""
    for tensor in [layer] if isinstance(layer, Tensor) else layer.parameters():
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)


def _find_mismatched_keys(
    model: nn.Module, peft_model_state_dict: dict[str, Tensor], ignore_mismatched_sizes: bool = False
) -> tuple[dict[str, Tensor], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Removes the tensors whose shapes differ from the model's from a dictionary, in place.

    Args:
        model: the model.
        peft_model_state_dict: key in the model's state dict -> tensor.
        ignore_mismatched_sizes: False to remove nothing.

    Returns:
        The dictionary, and key, shape and the model's shape of each removed tensor.
    """
    own = model.state_dict() if ignore_mismatched_sizes else {}
    removed = [
        (key, tuple(tensor.shape), tuple(own[key].shape))
        for key, tensor in peft_model_state_dict.items()
        if key in own and own[key].shape != tensor.shape and not _holds_two_in_a_byte(own[key], tensor)
    ]
    for key, _, _ in removed:
        del peft_model_state_dict[key]
    return peft_model_state_dict, removed


def _holds_two_in_a_byte(stored: Tensor, tensor: Tensor) -> bool:
    """Returns whether a stored tensor can be the 4-bit form of another one."""
    return stored.ndim > 0 and stored.shape[-1] == 1 and stored.numel() * 2 == tensor.numel()


def get_bnb_param_type(param: nn.Parameter) -> Any:
    """Returns "4bit" or "8bit" for a parameter of bitsandbytes; False for any other."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)


def _is_valid_match(key: str, target_key: str) -> bool:
    """Returns whether a path equals a name or ends with it, in whole components."""
    return matches_segment_names(key, [target_key])


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freezes one adapter."""
    require_manager(model).set_requires_grad(adapter_name, False)


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Activates adapters, including their modules trained as a whole."""
    set_adapter(model, adapter_name, inference_mode)


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """Returns the path of a module in a model; the empty string if the model does not contain it."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> Any:
    """Returns accelerate's device map of a model, or the device of a model that is not distributed."""
    return getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}


def has_valid_embedding_base_layer(layer: Any) -> bool:
    """Returns whether a layer is an adapted embedding or linear layer."""
    return isinstance(getattr(layer, "base_layer", None), nn.Linear | nn.Embedding)


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """Returns the path of an embedding layer in a model, or of its frozen base layer if it is adapted.

    Args:
        model: the model.
        layer: the embedding layer.
        is_embedding_in_target_modules: whether the layer itself is not searched for, but only its base layer.

    Returns:
        The path; None if the model contains neither.
    """
    wanted = [getattr(layer, "base_layer", None), *([] if is_embedding_in_target_modules else [layer])]
    return next((name for name, module in model.named_modules() if any(module is one for one in wanted)), None)


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """Calls ``torch.load``, by default with ``weights_only=True``."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def _insert_adapter_name_into_state_dict(
    state_dict: Mapping[str, Tensor], adapter_name: str, parameter_prefix: str
) -> dict[str, Tensor]:
    """Returns the tensors of an adapter's file with the names that they have in a model.

    Args:
        state_dict: key in the file -> tensor.
        adapter_name: name of the adapter.
        parameter_prefix: prefix of the method's parameters, such as ``lora_``; keys without it stay.
    """

    def named(key: str) -> str:
        before, _, after = key.partition(parameter_prefix)
        part, *rest = after.split(".", 1)
        return before + parameter_prefix + ".".join([part, adapter_name, *rest]) if parameter_prefix in key else key

    return {named(key): tensor for key, tensor in state_dict.items()}
