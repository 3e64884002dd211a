"""State dicts of adapters under the keys of PEFT's files, and of the base model without its adapters."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import AdapterWeights, TiedAdapter, WeightInitialized, source_of
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.runtime.manager import AdapterManager, require_manager
from nbpeft.engine.tree.model_tree import bare_modules, bare_names, unwrapped
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import BaseMismatchError, CheckpointError, ConfigError, did_you_mean, few, with_article
from nbpeft.model.saving.files import file_tensors, replaced_state_dict
from nbpeft.model.saving.loading import LoadResult, drop_unchanged, load_result, shapes_of, warn_of_other_shapes
from nbpeft.model.saving.offloaded import embedding_weights, refuse_offloaded, refuse_offloaded_adapter
from nbpeft.model.saving.sharded import like

_Arguments = ParamSpec("_Arguments")


def _in_one_transaction(function: Callable[_Arguments, LoadResult]) -> Callable[_Arguments, LoadResult]:
    """Decorator that runs a function in one transaction of ``model``, its first argument."""

    @functools.wraps(function)
    def command(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> LoadResult:
        model: Any = args[0] if args else kwargs["model"]
        with require_manager(model).transaction():
            return function(*args, **kwargs)

    return command


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """Returns the tensors of one adapter under the keys of its file.

    Args:
        model: a PeftModel or an adapted base model.
        state_dict: take the tensors from this dictionary; None for those of the model, or of a ``state_dict()``
            method that was set on it.
        adapter_name: name of the adapter.
        unwrap_compiled: accepted for compatibility with PEFT and ignored; a compiled model is always unwrapped.
        save_embedding_layers: also the embeddings; "auto" decides from the model.

    Returns:
        Detached references to the tensors. Keys are those of an adapter file; for a base model without a PeftModel they
        lack the prefix ``base_model.model.``, as in PEFT.
    """
    manager = require_manager(model)
    given = replaced_state_dict(model, manager) if state_dict is None else state_dict
    tensors = file_tensors(manager, adapter_name, embeddings=save_embedding_layers, state_dict=given)
    if unwrapped(model) is manager.model:
        return {checkpoint.without_prefix(key): tensor for key, tensor in tensors.items()}
    return tensors


@torch.no_grad()
@_in_one_transaction
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copies tensors under the keys of an adapter file into an adapter of the model.

    Args:
        model: a PeftModel or an adapted base model.
        peft_model_state_dict: key -> tensor. It can also be the state dict of a whole model or a part of it, whose keys
            include the adapter's name, in our layout or PEFT's; its tensors of the base are ignored. Biases of the
            base among the keys of an adapter file are loaded whatever ``bias`` the config has, as in PEFT.
        adapter_name: name of the adapter.
        ignore_mismatched_sizes: skip tensors of another shape instead of raising an error.
        low_cpu_mem_usage: accepted for compatibility with PEFT and ignored.

    Returns:
        The missing and unexpected keys. A missing tensor keeps its value; on the meta device, where it has none, it
        gets that with which the layer adds nothing.

    Raises:
        CheckpointError: no key fits, or tied tensors have different values.
        BaseMismatchError: shapes do not fit.
    """
    manager = require_manager(model)
    if not isinstance(peft_model_state_dict, Mapping):
        raise ConfigError(f"the state dict must be a dictionary of tensors, not {with_article(peft_model_state_dict)}")
    weights = manager.weights(adapter_name)
    peft_type = method_of(manager.configs[adapter_name]).peft_type
    whole = checkpoint.is_of_a_model(peft_model_state_dict, adapter_name, peft_type)
    present = embedding_weights(manager.model) | ({} if whole else _biases(manager.model))
    wanted = _expected(weights, present)
    config = manager.configs[adapter_name]
    packed = checkpoint.keys_of_a_file(peft_model_state_dict, adapter_name, peft_type)
    tensors = method_of(config).files.unpack(config, packed)
    started: Mapping[str, WeightInitialized] = {}
    options: dict[str, Any] = {"peft_type": peft_type, "ignore_mismatched": ignore_mismatched_sizes}
    options["conversion"] = checkpoint.key_conversion_of(manager.model)
    try:
        loaded = checkpoint.from_file(tensors, wanted, **options)
    except BaseMismatchError:
        started = _lost_starts(manager, adapter_name)
        if not started:
            raise
        shapes = {path: adapter.shapes_with_start() for path, adapter in started.items()}
        loaded = checkpoint.from_file(tensors, replace(wanted, adapters={**wanted.adapters, **shapes}), **options)
    warn_of_other_shapes(loaded)
    refuse_offloaded_adapter(manager, adapter_name)
    if any(present[key].is_meta for key in loaded.weights.base if key in present):
        refuse_offloaded(manager.model, drop_unchanged(loaded.weights, embedding_weights(manager.model, loaded=True)))
    _check_tied(manager, adapter_name, weights, loaded.weights)
    with manager.transaction() as change:
        for path, adapter in started.items():
            loaded.weights.adapters[path] = adapter.split_start(loaded.weights.adapters[path], change)
        _write(manager, adapter_name, weights, loaded, present, change)
    # The state dict of a whole model also has the tensors of the base and of other adapters.
    unexpected = [key for key in loaded.unexpected if not (whole and key in peft_model_state_dict)]
    missing = [*loaded.missing, *loaded.mismatched]
    return load_result(manager, adapter_name, missing, unexpected, bare=unwrapped(model) is manager.model)


def _check_tied(manager: AdapterManager, name: str, present: AdapterWeights, weights: AdapterWeights) -> None:
    """Raises CheckpointError if tensors that are tied in the adapter differ in a state dict.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        present: the adapter's tensors.
        weights: tensors of the state dict.
    """
    given = weights.adapters
    first: dict[int, tuple[str, Tensor]] = {}
    for path, key, value in ((path, key, value) for path, named in given.items() for key, value in named.items()):
        owner, other = first.setdefault(id(present.adapters[path].get(key, value)), (path, value))
        if value is not other and not torch.equal(value.to(other), other):
            raise CheckpointError(
                f"the state dict has different {key} for {path} and {owner}, which share it in adapter {name!r}"
            )
    adapters = {path: manager.layers[path].adapter(name) for path in given}
    paths = {id(adapter): path for path, adapter in adapters.items()}
    for path, adapter in adapters.items():
        source = paths.get(id(source_of(adapter)))
        if source is not None and isinstance(adapter, TiedAdapter) and adapter.differs(given[path], given[source]):
            raise CheckpointError(
                f"the state dict has different tensors for {path} and {source}, which share one pair in adapter "
                f"{name!r} (ensure_weight_tying)"
            )


def _lost_starts(manager: AdapterManager, name: str) -> dict[str, WeightInitialized]:
    """Returns path -> adapter whose file has its initial component too; see ``WeightInitialized.loses_start``."""
    found = {path: layer.adapter(name) for path, layer in manager.layers_with(name).items()}
    return {
        path: adapter
        for path, adapter in found.items()
        if isinstance(adapter, WeightInitialized) and adapter.loses_start
    }


def _write(
    manager: AdapterManager,
    name: str,
    weights: AdapterWeights,
    loaded: checkpoint.Loaded,
    present: Mapping[str, Tensor],
    change: Transaction,
) -> None:
    """Copies loaded tensors into the tensors of an adapter."""
    writes = [
        (own[path][key], value)
        for own, new in ((weights.adapters, loaded.weights.adapters), (weights.copies, loaded.weights.copies))
        for path, named in sorted(new.items())  # sharded tensors communicate: use the same order everywhere
        for key, value in sorted(named.items())
    ]
    writes += [(weights.shared[key], value) for key, value in sorted(loaded.weights.shared.items())]
    writes += [
        (present[key] if key in present else weights.base[key], value)
        for key, value in sorted(loaded.weights.base.items())
    ]
    change.keep_values([own for own, _ in writes if not own.is_meta])
    _fill_in(manager, name, {id(own): value for own, value in writes if own.is_meta}, change)
    _complete(manager, name, loaded.weights.adapters, change)
    for own, value in writes:
        if not own.is_meta:
            own.copy_(like(own, value))
    shared = manager.shared(name)
    if shared is not None and loaded.weights.shared:
        adapted = manager.layers_with(name)
        shared.recompute_derived({path: (layer.adapter(name), layer.base) for path, layer in adapted.items()}, change)


def drop_values(manager: AdapterManager, name: str) -> None:
    """Moves the parameters of an adapter to the meta device, where they need no memory until they are loaded."""
    with manager.transaction() as change:
        _replace_data(manager, name, lambda parameter, layer: parameter.detach().to("meta"), change)


def _fill_in(manager: AdapterManager, name: str, values: Mapping[int, Tensor], change: Transaction) -> None:
    """Replaces an adapter's parameters on the meta device; ``values`` is keyed by the id of the parameter."""

    def filled(parameter: nn.Parameter, layer: AdaptedLayer) -> Tensor | None:
        value = values.get(id(parameter))
        return None if value is None else value.to(layer.base.device, parameter.dtype, copy=True)

    if values:
        _replace_data(manager, name, filled, change)


def _complete(
    manager: AdapterManager, name: str, given: Mapping[str, Mapping[str, Tensor]], change: Transaction
) -> None:
    """Gives the parameters that are still on the meta device the values with which their layer adds nothing.

    Args:
        manager: manager of the model.
        name: name of the adapter.
        given: path -> tensors that were loaded, which stay as they are.
        change: the transaction of the load.
    """
    adapters = {path: layer.adapter(name) for path, layer in manager.layers_with(name).items()}
    incomplete = {
        path: adapter
        for path, adapter in adapters.items()
        if any(parameter.is_meta for parameter in adapter.parameters())
    }
    if not incomplete:
        return

    def zeros(parameter: nn.Parameter, layer: AdaptedLayer) -> Tensor | None:
        return torch.zeros_like(parameter, device=layer.base.device) if parameter.is_meta else None

    _replace_data(manager, name, zeros, change)
    for path, adapter in incomplete.items():
        adapter.reset_(manager.layers[path].base)
        for key, value in given.get(path, {}).items():
            own = adapter._parameters[key]
            if own is not None:
                own.copy_(like(own, value))


def _replace_data(
    manager: AdapterManager, name: str, data: Callable[[nn.Parameter, AdaptedLayer], Tensor | None], change: Transaction
) -> None:
    """Replaces each parameter for which ``data`` returns new values; shared parameters stay shared."""
    replaced: dict[int, nn.Parameter] = {}
    for layer in manager.layers_with(name).values():
        adapter = layer.adapter(name)
        for key, parameter in dict(adapter._parameters).items():
            if parameter is None or key in adapter.peft.constants:
                continue
            if id(parameter) not in replaced and (values := data(parameter, layer)) is not None:
                replaced[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
            if id(parameter) in replaced:
                change.set_item(adapter._parameters, key, replaced[id(parameter)])


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the base model's tensors under the keys that they have without adapters.

    Args:
        model: a PeftModel or an adapted base model.

    Returns:
        References to the tensors.
    """
    base = require_manager(model).model
    bare = bare_names(base)
    return {own: tensor for key, tensor in base.state_dict().items() if (own := bare(key)) is not None}


@_in_one_transaction
def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Loads tensors under the keys of the bare base model; adapters are not changed.

    Args:
        model: a PeftModel or an adapted base model.
        state_dict: key in the bare base model -> tensor.
        strict: raise an error for missing or unknown keys.

    Returns:
        The missing and unexpected keys.

    Raises:
        BaseMismatchError: keys (if ``strict``) or shapes do not fit; nothing was loaded.
        MergeError: adapters are merged into the weights.
    """
    manager = require_manager(model)
    manager.refuse_merged("loading base weights")
    base = manager.model
    bare = bare_names(base)
    present = base.state_dict()
    wrapped = {own: key for key in present if (own := bare(key)) is not None}
    missing = [key for key in wrapped if key not in state_dict]
    unexpected = [key for key in state_dict if key not in wrapped]
    if strict and (missing or unexpected):
        hint = did_you_mean(unexpected[0], wrapped) if unexpected else ""
        wrong = {"Missing key(s)": missing, "Unexpected key(s)": unexpected}  # the terms of torch's load_state_dict
        parts = [f"{what}: {few(keys, 3)}." for what, keys in wrong.items() if keys]
        raise BaseMismatchError(f"the state dict does not fit the base model. {' '.join(parts)}{hint}")
    given = {wrapped[key]: tensor for key, tensor in state_dict.items() if key in wrapped}
    for key, tensor in given.items():
        if isinstance(present[key], Tensor) and present[key].shape != tensor.shape:
            raise BaseMismatchError(f"{bare(key)} is {tuple(tensor.shape)}, expected {tuple(present[key].shape)}")
    with manager.transaction() as change:
        change.keep_values([present[key] for key in given if isinstance(present[key], Tensor)])
        base.load_state_dict(given, strict=False)
    return LoadResult(missing, unexpected)


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Reads the tensors of a saved adapter under the keys of its file.

    Args:
        model_id: a folder or a hub id.
        device: device to load the tensors to; by default "cuda" if available, else "cpu".
        key_mapping: regular expression -> replacement, applied to the keys.
        **hub: ``subfolder``, ``revision``, ``cache_dir``, ``token``, …

    Returns:
        Key -> tensor, in the dtype of the file.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    saved = checkpoint.read_checkpoint(model_id, device=device, **hub).unread.unchanged()
    return checkpoint.remapped(saved.read(), key_mapping)


def _expected(weights: AdapterWeights, present: Mapping[str, Tensor]) -> checkpoint.Expected:
    """The tensors that are looked for in a state dict.

    Args:
        weights: the adapter's tensors.
        present: tensors of the base model that the state dict may have as well.
    """
    inside = tuple(f"{path}." for path in weights.copies)
    modules = [(f"{path}.", named) for path, named in (*weights.copies.items(), *weights.adapters.items())]
    return checkpoint.Expected(
        adapters={path: shapes_of(named) for path, named in weights.adapters.items()},
        copies={path: shapes_of(named) for path, named in weights.copies.items()},
        base=shapes_of(weights.base),
        shared=shapes_of(weights.shared),
        optional=shapes_of({key: value for key, value in present.items() if not key.startswith(inside)}),
        others={
            f"{prefix}{key}": tensor.dtype
            for prefix, named in (*modules, (checkpoint.SHARED_PREFIX, weights.shared))
            for key, tensor in named.items()
            if not tensor.is_floating_point()
        },
        parameters=weights.parameters,
    )


def _biases(model: nn.Module) -> dict[str, Tensor]:
    """Returns name in the bare model -> bias."""
    owners = ((f"{path}.bias".lstrip("."), module._parameters.get("bias")) for path, module in bare_modules(model))
    return {name: bias for name, bias in owners if bias is not None}
