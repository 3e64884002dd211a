"""PEFT's functions for hot-swapping saved adapters."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.hotswap import Swapped, check_contents, config_for_slot, prepare_for_hotswap, swap
from nbpeft.engine.injection.build import CollectionPaused
from nbpeft.engine.runtime.adapter_tensors import parameter_paths
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.tree.fused_layers import of_former_file
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import ConfigError, HotSwapError, did_you_mean, few
from nbpeft.model.saving.loading import HUB_OPTIONS, base_mismatch, not_floating, shapes_of
from nbpeft.model.saving.offloaded import embedding_weights
from nbpeft.model.saving.saved_places import note_place

_CHECKS = ("error", "warn", "ignore")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    *,
    validate: Callable[[nn.Module], object] | None = None,
    done: Callable[[Transaction], None] | None = None,
    allow_missing: bool = False,
    **kwargs: Any,
) -> Swapped:
    """Replaces an adapter on the model by a saved one, which gets its name.

    Everything is checked before the first byte is copied. Tensors are overwritten in place, so that a compiled model
    that was prepared with ``prepare_model_for_compiled_hotswap`` is not recompiled. If the model is not compiled, the
    adapter's rank grows if necessary.

    Args:
        model: a PeftModel, compiled or not, or an adapted base model.
        model_name_or_path: a folder or a hub id.
        adapter_name: name of the adapter to replace.
        torch_device: device to load the file to; None for the CPU.
        validate: called with the model after the swap, when the new adapter is the only active one. If it returns
            False or raises, the old adapter is restored bit for bit.
        done: called last with the transaction of the swap; raising an error still undoes it.
        allow_missing: accept a file that lacks some tensors of a layer, with a warning; the layer then adds nothing.
            By default it is refused. Layers that the file lacks completely add nothing in any case.
        **kwargs: ``config`` to use instead of the saved one, ``key_mapping``, and hub options: ``subfolder``,
            ``revision``, ``cache_dir``, ``token``, …

    Returns:
        What was swapped.

    Raises:
        HotSwapError: the adapter cannot take the slot, or was refused by ``validate``.
        ConfigError: a keyword argument is misspelt.
        CheckpointError: the checkpoint cannot be read or belongs to another base.
    """
    manager = require_manager(model)
    manager.require(adapter_name)
    _refuse_misspelt(kwargs)
    hub = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS and value is not None}
    with CollectionPaused():
        saved = checkpoint.read_checkpoint(model_name_or_path, device=torch_device or "cpu", **hub)
        form = checkpoint.prompt_format(saved.config)
        notes = (base_mismatch(manager, saved.metadata), checkpoint.other_classes(manager.model, form))
    config = kwargs.get("config") or saved.config
    with manager.transaction() as change:
        change.on_undo(checkpoint.name_classes(manager.model, form))
        options: dict[str, Any] = {"key_mapping": kwargs.get("key_mapping"), "allow_missing": allow_missing}
        swapped = _swap(model, manager, adapter_name, config, saved.unread, validate, done, **options)
    if not hub and os.path.isdir(os.path.expanduser(model_name_or_path)):
        note_place(manager, adapter_name, model_name_or_path)
    for note in filter(None, notes):
        warnings.warn(note, stacklevel=2)
    return swapped


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: AdapterConfig,
    parameter_prefix: str = "lora_",
    *,
    validate: Callable[[nn.Module], object] | None = None,
    allow_missing: bool = False,
) -> Swapped:
    """Replaces an adapter like ``hotswap_adapter``, with tensors in memory.

    Args:
        model: a PeftModel, compiled or not, or an adapted base model.
        state_dict: tensors under the keys of an adapter file, or of a PeftModel, which include the adapter's name.
        adapter_name: name of the adapter to replace.
        config: config of the new adapter.
        parameter_prefix: accepted for compatibility with PEFT and ignored.
        validate: see ``hotswap_adapter``.
        allow_missing: see ``hotswap_adapter``.

    Returns:
        What was swapped.
    """
    manager = require_manager(model)
    manager.require(adapter_name)
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise HotSwapError("state_dict must have tensors under the keys of an adapter file, and nothing else")
    with manager.transaction():
        manager.require(adapter_name)
        peft_type = method_of(manager.configs[adapter_name]).peft_type
        plain = checkpoint.keys_of_a_file(_apart(state_dict, manager.parameters(adapter_name)), adapter_name, peft_type)
        return _swap(model, manager, adapter_name, config, plain, validate, allow_missing=allow_missing)


def _apart(tensors: Mapping[str, Tensor], own: Iterable[Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with copies of those in the slot's memory, which are written before all are read."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in own}
    return {
        key: tensor.clone()
        if tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in memory
        else tensor
        for key, tensor in tensors.items()
    }


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: AdapterConfig | Mapping[str, AdapterConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Prepares a model for being compiled and then hot-swapped without recompilation.

    Call it after loading the first adapter and before ``torch.compile``. Outputs do not change.

    Args:
        model: a PeftModel or an adapted base model.
        target_rank: the largest rank of future adapters, to which factors are padded with zeros; None for no padding.
        config: configs whose rank is set to the target rank too, with an alpha that preserves every scaling. Not
            needed with nbpeft, which saves the true rank without the padding.
        check_compiled: what to do if the model is already compiled: "error", "warn" or "ignore".

    Raises:
        HotSwapError: the model is already compiled, has no adapter, or one of larger rank.
        ConfigError: an argument is invalid, or a layer does not support the rank.
    """
    if target_rank is not None and (type(target_rank) is not int or target_rank < 1):
        raise ConfigError(f"target_rank must be a positive whole number, not {target_rank!r}")
    configs = [] if config is None else list(config.values()) if isinstance(config, Mapping) else [config]
    for each in configs:
        if not isinstance(each, AdapterConfig):
            raise ConfigError(f"config must be an adapter's config, or a dictionary of them by name, not {each!r:.60}")
    if check_compiled not in _CHECKS:
        raise ConfigError(
            f"check_compiled must be one of {', '.join(map(repr, _CHECKS))}, not {check_compiled!r}."
            + did_you_mean(str(check_compiled), _CHECKS)
        )
    if _compiled(model) and check_compiled != "ignore":
        if check_compiled == "error":
            raise HotSwapError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled: it will compile "
            "again",
            stacklevel=2,
        )
    manager = manager_of(model)
    if manager is None:
        raise HotSwapError("No adapter layers found on the model: load an adapter before preparing for hot-swapping")
    prepare_for_hotswap(manager, target_rank)
    if target_rank is None:
        return
    names = {id(own): name for name, own in manager.configs.items()}
    for each in configs:
        name = names.get(id(each))
        paths = [] if name is None else [path for path, layer in manager.layers.items() if name in layer.adapters]
        each.set_size(target_rank, paths)


def _refuse_misspelt(keywords: Mapping[str, object]) -> None:
    """Refuses misspelt keywords. Unknown ones are ignored as in PEFT, but ``validate`` must not be lost to a typo."""
    known = (*HUB_OPTIONS, "config", "key_mapping", "torch_device", "validate", "done", "allow_missing")
    for name in keywords:
        close = [] if name in known else difflib.get_close_matches(name, known, 1, 0.8)
        if close:
            raise ConfigError(f"hotswap_adapter has no argument {name!r}. Did you mean {close[0]!r}?", field=name)


def _swap(
    model: nn.Module,
    manager: AdapterManager,
    name: str,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor] | checkpoint.UnreadTensors,
    validate: Callable[[nn.Module], object] | None,
    done: Callable[[Transaction], None] | None = None,
    *,
    key_mapping: Mapping[str, str] | None = None,
    allow_missing: bool = False,
) -> Swapped:
    manager.require(name)
    config = of_former_file(manager.model, config, tensors)
    expected = _expected(manager, name, config)
    loaded = checkpoint.from_file(
        tensors,
        expected,
        peft_type=method_of(config).peft_type,
        key_mapping=key_mapping,
        conversion=checkpoint.key_conversion_of(manager.model),
    )
    if loaded.unexpected:
        raise HotSwapError(
            f"unexpected keys found: adapter {name!r} has no {few(loaded.unexpected, 3, quoted=False)}; "
            "load the adapter under another name",
            unexpected=tuple(loaded.unexpected),
        )
    if allow_missing:
        _leave_incomplete_out(expected, loaded.weights)
    _leave_embeddings_out(manager, name, loaded.weights)
    check = None if validate is None else lambda: validate(model)
    options: Any = {"grow": not _compiled(model), "shapes": expected.adapters}
    options["consume"] = isinstance(tensors, checkpoint.UnreadTensors)  # nobody else has what was read for this swap
    return swap(manager, name, config, loaded.weights, validate=check, done=done, **options)


def _expected(manager: AdapterManager, name: str, config: Any) -> checkpoint.Expected:
    """Returns the keys and shapes that a file with this config may have to replace an adapter.

    Raises:
        HotSwapError: the config is of another method, or its rank is not possible for a layer.
    """
    label, slot_label = method_of(config).label, method_of(manager.configs[name]).label
    if label != slot_label:
        raise HotSwapError(
            f"adapter {name!r} is {slot_label} and cannot be swapped for {label}; load the new one under another name",
            name=name,
        )
    check_contents(name, manager.configs[name], config)
    filled = config_for_slot(manager, name, config)
    adapters: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, layer in manager.layers.items():
        if name in layer.adapters._modules:
            adapter = layer.adapter(name)
            if isinstance(adapter, ModelAdapter):  # its shapes depend on the model
                raise HotSwapError(f"{path}: adapter {name!r} {adapter.swap_refusal()}", path=path)
            try:
                adapters[path] = type(adapter).parameter_shapes(filled, path, layer.base.module, layer.kind)
            except ConfigError as error:
                raise HotSwapError(str(error)) from None
    copies = {
        path: shapes_of(trained.state_dict())
        for path, module in manager.copies.items()
        if (trained := module.modules_to_save._modules.get(name)) is not None
    }
    embeddings = embedding_weights(manager.model)
    return checkpoint.Expected(
        adapters=adapters,
        copies=copies,
        base=shapes_of(manager.base_biases(name)),
        optional=shapes_of({key: value for key, value in embeddings.items() if key.rpartition(".")[0] not in copies}),
        others=not_floating({path: manager.copies[path].modules_to_save[name] for path in copies}),
        parameters=parameter_paths(manager.layers),
    )


def _leave_incomplete_out(expected: checkpoint.Expected, weights: AdapterWeights) -> None:
    """Drops the layers of which a file has only some tensors, with a warning: they add nothing."""
    lacking = {path: expected.adapters[path].keys() - tensors.keys() for path, tensors in weights.adapters.items()}
    incomplete = {path: names for path, names in lacking.items() if any(not name.endswith("_bias") for name in names)}
    for path in incomplete:
        del weights.adapters[path]
    if incomplete:
        shown = few([f"{path}.{name}" for path, names in incomplete.items() for name in sorted(names)], 3)
        warnings.warn(f"the new adapter lacks {shown}: the layers that lack tensors add nothing", stacklevel=5)


def _leave_embeddings_out(manager: AdapterManager, name: str, weights: AdapterWeights) -> None:
    """Drops embeddings in the file that equal the base's; different ones cannot be swapped."""
    own = manager.base_biases(name)
    brought = [key for key in weights.base if key not in own]
    present = embedding_weights(manager.model, loaded=True) if brought else {}
    for key in brought:
        if not torch.equal(weights.base[key].to(present[key]), present[key]):
            raise HotSwapError(f"the new adapter has its own {key}, which all adapters share; load it instead")
        del weights.base[key]


def _compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or bool(getattr(model, "_compiled_call_impl", None))
